"""All servers as one: splits batches, fans out control calls, keeps the weight version and who may serve."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import (
    ConfigError,
    ServerError,
    ServerLostError,
    ServerUnreachableError,
    SGLangError,
    WeightSyncError,
)
from torchrl_sglang.parallel import Outcome, side_by_side
from torchrl_sglang.protocol.control import build_ready
from torchrl_sglang.protocol.generate import build_generate, parse_generate, parse_one
from torchrl_sglang.protocol.limits import check_prompts
from torchrl_sglang.protocol.media import Media
from torchrl_sglang.protocol.messages import GenerateReply, HttpRequest, ServerInfo, WeightSpan
from torchrl_sglang.protocol.routing import split_batch
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.streaming import generate_streaming

__all__ = ["Adapter", "SGLangPool"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter that stands for the trainer's weights.

    Attributes:
        name: its name on the servers.
        version: the weight version it stands for, as a server's version string.
    """

    name: str
    version: str


class SGLangPool:
    """One or more servers of the same model behind one ``generate``.

    Thread-safe. Pickles as its clients; a copy connects where it lands and keeps its own view of who is quarantined.

    Args:
        clients: one client per server.

    Attributes:
        clients: all servers, also quarantined ones.
        weight_version: version number of the weights that the last finished sync put on the routed servers; after
            :meth:`connect` the highest version found. This is where rollout and weight sync meet.
        highest_version: highest version number that any server was ever told; it names no other weights again.
        adapter: the trainer's LoRA adapter, for requests that name no other; set by a sync on the LoRA road.
        cache_salt: name-space of the prefix caches that new requests use; set by a sync that could not flush.
    """

    def __init__(self, clients: Sequence[SGLangClient]) -> None:
        if not clients:
            raise ConfigError("a pool needs at least one server")
        self.clients = tuple(clients)
        urls = [client.url for client in self.clients]
        if len(set(urls)) != len(urls):
            raise ConfigError(f"the same server is named twice: {urls}")
        self._init_runtime()

    def _init_runtime(self) -> None:
        self._lock = threading.Lock()
        self._load = {client.url: 0 for client in self.clients}
        self._quarantined: dict[str, str] = {}
        self._connected = False
        self.weight_version = 0
        self.highest_version = 0
        self.cache_salt: str | None = None
        self.adapter: Adapter | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"clients": self.clients}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_runtime()

    def __repr__(self) -> str:
        return f"SGLangPool({[client.url for client in self.clients]})"

    # ------------------------------------------------------------------ who is there

    def connect(self) -> None:
        """Ask every server what it is, once.

        A server that holds half-updated weights (its version is marked dirty) is quarantined until a full sync.

        Raises:
            ServerUnreachableError: a server does not listen.
            ConfigError: the servers don't serve the same model, or serve none that generates.
        """
        if self._connected:
            return
        outcomes = side_by_side({client.url: client.connect for client in self.clients})
        infos = [outcomes[client.url].unwrap() for client in self.clients]
        _check_same_model(infos)
        versions = {info.url: WeightVersion.parse(info.weight_version) for info in infos}
        for url, version in versions.items():
            if version.dirty:
                self.quarantine(url, f"it holds half-updated weights ({version}); a full sync heals it")
        # What an unfinished update was to replace was one lower: a new trainer counts on from there.
        self.weight_version = max(0, *(v.number - v.dirty for v in versions.values()))
        self._connected = True

    @property
    def info(self) -> ServerInfo:
        """What the first server said of itself; connects on first use."""
        self.connect()
        return self.clients[0].info

    @property
    def vocab_size(self) -> int | None:
        """Number of valid token ids: the smallest over the servers."""
        return self._smallest("vocab_size")

    @property
    def max_prompt_tokens(self) -> int | None:
        """Longest prompt every server takes."""
        return self._smallest("max_prompt_tokens")

    @property
    def context_length(self) -> int | None:
        """Prompt plus response limit that holds on every server."""
        return self._smallest("context_length")

    def _smallest(self, name: str) -> int | None:
        self.connect()
        values = [getattr(client.info, name) for client in self.clients]
        return min((value for value in values if value is not None), default=None)

    @property
    def healthy(self) -> tuple[SGLangClient, ...]:
        """The servers that requests are routed to."""
        return tuple(client for client in self.clients if client.url not in self._quarantined)

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Servers taken out of routing, with the reason."""
        return dict(self._quarantined)

    def quarantine(self, url: str, reason: str) -> None:
        """Take a server out of routing until :meth:`restore`."""
        with self._lock:
            if self._quarantined.get(url) != reason:
                _log.warning("%s is taken out of routing: %s", url, reason)
            self._quarantined[url] = reason

    def restore(self, url: str) -> None:
        """Put a server back into routing."""
        with self._lock:
            if self._quarantined.pop(url, None) is not None:
                _log.info("%s is back in routing", url)

    # ------------------------------------------------------------------ control

    def fan_out(
        self,
        build: Callable[[SGLangClient], HttpRequest],
        *,
        clients: Sequence[SGLangClient] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Outcome[Any]]:
        """Send one control call to every server (or to ``clients``) at the same time.

        Returns:
            Per URL the outcome; nothing is raised, since what a failure means depends on the call.
        """
        targets = self.clients if clients is None else clients

        def call(client: SGLangClient) -> Callable[[], Any]:
            return lambda: client.send(build(client), timeout_s=timeout_s)

        return side_by_side({client.url: call(client) for client in targets})

    # ------------------------------------------------------------------ generation

    def generate(
        self,
        ids_B_T: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        return_logprobs: bool = True,
        prompt_logprobs: bool = False,
        timeout_s: float | None = None,
        progress: Callable[[int], None] | None = None,
        lora: str | None = None,
        media: Sequence[Media] | None = None,
    ) -> list[GenerateReply]:
        """Generate ``sampling.n`` sequences for each of ``B`` prompts.

        Each server gets its share of the batch in one request; shares run side by side and equal prompts go to the
        same server. A share whose server turns out to be dead is generated by the others.

        Args:
            ids_B_T: prompt token ids, checked before anything is sent.
            sampling: how tokens are drawn.
            return_logprobs: report the log-prob of every response token.
            prompt_logprobs: report those of the prompt too.
            timeout_s: seconds for the whole batch instead of ``ClientConfig.generate_timeout_s``.
            progress: called with the number of newly generated tokens while the batch runs.
            lora: name of a loaded adapter.
            media: images, videos and sounds of each prompt (not together with ``progress``).

        Returns:
            ``B * n`` replies, prompt-major, in the order of the prompts.

        Raises:
            ConfigError: a prompt the servers could not serve; names its index and the limit.
            ServerError: a server failed in a way that leaves open whether requests ran, or no server is left.
        """
        if len(ids_B_T) == 0:
            return []
        self.check(ids_B_T, sampling)
        adapter = self.adapter if lora is None else None
        if media is not None and (progress is not None or len(media) != len(ids_B_T)):
            raise ConfigError("media needs one entry per prompt, and goes without progress")

        def run(client: SGLangClient, share: list[int]) -> list[GenerateReply]:
            prompts = [ids_B_T[index] for index in share]
            options: dict[str, Any] = {"return_logprobs": return_logprobs, "prompt_logprobs": prompt_logprobs}
            naming: dict[str, Any] = {"lora": lora or (adapter and adapter.name), "cache_salt": self.cache_salt}
            if progress is not None:
                return generate_streaming(
                    client, prompts, sampling, progress=progress, timeout_s=timeout_s, **naming, **options
                )
            shown = None if media is None else [media[index] for index in share]
            request = build_generate(prompts, sampling, media=shown, **naming, **options)
            answer = client.send(request, timeout_s=timeout_s)
            return parse_generate(answer, num_expected=len(share) * sampling.n, server=client.url, **options)

        replies: dict[int, list[GenerateReply]] = {}
        waiting = list(range(len(ids_B_T)))
        while waiting:
            waiting = self._run_round(ids_B_T, waiting, sampling.n, run, replies)
        ordered = [reply for index in range(len(ids_B_T)) for reply in replies[index]]
        _refuse_mixed_weights(ordered)
        return [_made_by(adapter, reply) for reply in ordered] if adapter is not None else ordered

    def _run_round(
        self,
        ids_B_T: Sequence[Sequence[int]],
        waiting: list[int],
        n: int,
        run: Callable[[SGLangClient, list[int]], list[GenerateReply]],
        replies: dict[int, list[GenerateReply]],
    ) -> list[int]:
        """Send out all waiting prompts once; returns those whose server died, to be sent to the others."""
        clients = self.healthy
        if not clients:
            raise ServerError(
                f"no server is left to generate {len(waiting)} prompts (of {len(ids_B_T)}): "
                + "; ".join(f"{url}: {reason}" for url, reason in self._quarantined.items())
            )
        with self._lock:
            load_S = [self._load[client.url] for client in clients]
            local = split_batch([ids_B_T[index] for index in waiting], load_S)
            shares = {
                client.url: (client, [waiting[i] for i in share])
                for client, share in zip(clients, local, strict=True)
                if share
            }
            for url, (_, share) in shares.items():
                self._load[url] += len(share) * n
        try:
            outcomes = side_by_side({url: _bind(run, client, share) for url, (client, share) in shares.items()})
        finally:
            with self._lock:
                for url, (_, share) in shares.items():
                    self._load[url] -= len(share) * n
        again: list[int] = []
        failure: SGLangError | None = None
        for url, (client, share) in shares.items():
            outcome = outcomes[url]
            if outcome.error is None:
                for position, index in enumerate(share):
                    replies[index] = outcome.unwrap()[position * n : (position + 1) * n]
            elif self._is_dead(client, outcome.error):
                self.quarantine(url, f"it died while generating ({outcome.error})")
                again.extend(share)
                if len(self.clients) == 1:
                    failure = outcome.error
            else:
                failure = failure or outcome.error
        if failure is not None:
            raise failure
        return sorted(again)

    def _is_dead(self, client: SGLangClient, error: SGLangError) -> bool:
        """A request is sent elsewhere only when its server is known dead: then no answer to it can exist."""
        if isinstance(error, ServerUnreachableError):
            return True
        if not isinstance(error, ServerLostError):
            return False
        try:
            client.send(build_ready())
        except ServerUnreachableError:
            return True
        except SGLangError:
            return False
        return False

    def stream(
        self, ids_T: Sequence[int], sampling: SamplingParams, *, return_logprobs: bool = True, lora: str | None = None
    ) -> Iterator[GenerateReply]:
        """Generate one sequence on the least busy server and yield it as it grows, all tokens so far each time.

        Args:
            ids_T: prompt token ids.
            sampling: how tokens are drawn; ``n`` is 1.
            return_logprobs: report the log-prob of every response token.
            lora: name of a loaded adapter.

        Raises:
            ConfigError: a prompt the servers could not serve.
            ServerError: no server is left, or the stream broke.
        """
        self.check([ids_T], sampling)
        clients = self.healthy
        if not clients:
            raise ServerError(f"no server is left: {self._quarantined}")
        client = min(clients, key=lambda each: self._load[each.url])
        request = build_generate(
            [ids_T],
            sampling,
            return_logprobs=return_logprobs,
            stream=True,
            lora=lora,
            cache_salt=self.cache_salt,
        )
        with self._lock:
            self._load[client.url] += 1
        try:
            for event in client.stream(request):
                reply = parse_one(event, server=client.url, return_logprobs=return_logprobs)
                _refuse_mixed_weights([reply])
                yield reply
        finally:
            with self._lock:
                self._load[client.url] -= 1

    def score(self, ids_B_T: Sequence[Sequence[int]], *, timeout_s: float | None = None) -> list[GenerateReply]:
        """Log-probs of given sequences: ``prompt_logprobs`` of each reply, the first entry ``None``."""
        sampling = SamplingParams(max_new_tokens=0)
        return self.generate(ids_B_T, sampling, prompt_logprobs=True, timeout_s=timeout_s)

    def check(self, ids_B_T: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        """Raise the error that :meth:`generate` would raise for this batch before sending it.

        Raises:
            ConfigError: names the prompt's index and the limit.
        """
        vocab_size = self.vocab_size
        if vocab_size is None and not self.clients[0].config.unchecked_vocab:
            raise ConfigError(
                f"the vocabulary of {self.info.model_path!r} can't be read from here, and an unknown token id kills an "
                "SGLang server: pass vocab_size=... when connecting (or unchecked_vocab=True)"
            )
        check_prompts(
            ids_B_T,
            max_new_tokens=sampling.max_new_tokens,
            vocab_size=vocab_size,
            max_prompt_tokens=self.max_prompt_tokens,
            context_length=self.context_length,
        )

    def close(self) -> None:
        """Close all idle connections."""
        for client in self.clients:
            client.close()


def _bind(
    run: Callable[[SGLangClient, list[int]], list[GenerateReply]], client: SGLangClient, share: list[int]
) -> Callable[[], list[GenerateReply]]:
    return lambda: run(client, share)


def _check_same_model(infos: Sequence[ServerInfo]) -> None:
    first = infos[0]
    for info in infos:
        if not info.is_generation:
            raise ConfigError(f"{info.url} serves {info.model_path!r}, which does not generate text")
        if (info.architectures, info.vocab_size) != (first.architectures, first.vocab_size):
            raise ConfigError(
                f"{first.url} serves {first.model_path!r} and {info.url} serves {info.model_path!r}: "
                "one pool needs servers of one model"
            )


def _made_by(adapter: Adapter, reply: GenerateReply) -> GenerateReply:
    """A request keeps the adapter it began with, and servers don't count adapters as weight versions."""
    span = WeightSpan(version=adapter.version, start=0, end=len(reply.output_ids))
    return replace(reply, weight_version=adapter.version, weight_spans=(span,))


def _refuse_mixed_weights(replies: Sequence[GenerateReply]) -> None:
    for reply in replies:
        if any(WeightVersion.parse(span.version).dirty for span in reply.weight_spans if span.end > span.start):
            raise WeightSyncError(
                f"{reply.server} generated with half-updated weights ({reply.weight_version}); the batch is thrown "
                "away. Send the weights again",
                server_weights={reply.server: "mixed"},
            )
