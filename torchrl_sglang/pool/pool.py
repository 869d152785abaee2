"""Several servers behind one ``generate``: divides batches over them and retries only what cannot have run."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.config.checking import require_number
from torchrl_sglang.errors import ConfigError, LethalPromptError, RequestRejectedError, ServerError, SGLangError
from torchrl_sglang.forks import renew_in_forked_children
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool.balancing import LoadTracker
from torchrl_sglang.pool.batch import Batch
from torchrl_sglang.pool.batch_run import BatchRun
from torchrl_sglang.pool.checks import label_with_version, refuse_different_models, refuse_mixed_weights
from torchrl_sglang.pool.dead_servers import DeadServerTracker
from torchrl_sglang.pool.dispatch import dead_server, is_gone
from torchrl_sglang.pool.end_tokens import EndTokens
from torchrl_sglang.pool.reply_weights import ReplyChecks
from torchrl_sglang.pool.router_client import MAX_REQUESTS, RouterClient
from torchrl_sglang.pool.state import PoolState, ServerState
from torchrl_sglang.pool.update_lock import UpdateLock
from torchrl_sglang.protocol.generate import build_generate, parse_one
from torchrl_sglang.protocol.limits import check_prompts, check_sampling
from torchrl_sglang.protocol.media import Media
from torchrl_sglang.protocol.messages import GenerateReply, HttpRequest, ServerInfo
from torchrl_sglang.protocol.router import has_no_workers, router_forwards, worker_in_error
from torchrl_sglang.protocol.stream_events import StreamedReply
from torchrl_sglang.protocol.version import version_number

__all__ = ["SGLangPool"]

_log = logging.getLogger(__name__)

_POLL_S = 0.2


class SGLangPool:
    """One or more servers of the same model behind one ``generate``.

    Thread-safe. Pickles as its clients. A pickled copy, or a forked child's, connects anew and has its own state.

    Args:
        clients: one client per server.
        router: an sglang-router before the servers, for generation. Control calls go to the servers themselves, and so
            do requests with a field that the router would drop, and those with ``progress``.

    Raises:
        ConfigError: no client, or two for the same server.

    Attributes:
        clients: all servers, also quarantined ones.
        router: as given.
        state: the records of the servers and of the weights on them (:class:`~torchrl_sglang.pool.PoolState`), which
            rollout and weight sync share.
        update_lock: held while weights are synced, and while it is decided whether a restarted server holds the
            current ones.
    """

    def __init__(self, clients: Sequence[SGLangClient], *, router: RouterClient | None = None) -> None:
        if not clients:
            raise ConfigError("a pool needs at least one server")
        self.clients = tuple(clients)
        urls = [client.url for client in self.clients]
        if len(set(urls)) != len(urls):
            raise ConfigError(f"the same server is named twice: {urls}")
        self.router = router
        self._init_runtime()

    def _init_runtime(self) -> None:
        self.state = PoolState(client.url for client in self.clients)
        self.update_lock = UpdateLock()
        self._weight_sync: weakref.ref[Any] | None = None
        self._connected = False
        self._load = LoadTracker()
        self._end_tokens = EndTokens()
        self._dead_servers = DeadServerTracker(self.state, self._server_returned)
        update_timeout_s = max(client.config.update_timeout_s for client in self.clients)
        self._reply_checks = ReplyChecks(self.state, self._leave_router, timeout_s=update_timeout_s)
        renew_in_forked_children(self)

    def renew_after_fork(self) -> None:
        """Start with a state and locks of its own, as a pickled copy does; called in a forked child."""
        self._init_runtime()

    def __getstate__(self) -> dict[str, Any]:
        return {"clients": self.clients, "router": self.router}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_runtime()

    def __repr__(self) -> str:
        return f"SGLangPool({[client.url for client in self.clients]})"

    # ------------------------------------------------------------------ the servers

    def connect(self) -> None:
        """Ask every server what it serves, once.

        A server whose weights are half-updated (its version is marked dirty) gets no requests until the update that
        another process has begun is over, or until a full sync.

        Raises:
            ServerUnreachableError: a server (or the router) does not listen.
            ConfigError: the servers serve different models, or one that does not generate.
            ServerTimeoutError: the router does not admit a server.
        """
        if self._connected:
            return
        outcomes = side_by_side({client.url: client.connect for client in self.clients})
        infos = [outcomes[client.url].unwrap() for client in self.clients]
        refuse_different_models(infos)
        for info in infos:
            if info.weight_version.startswith("dirty-"):
                held = info.weight_version
                self.state.found_dirty(
                    info.url,
                    f"it holds half-updated or unverified weights ({held}): another process is updating it, or died in "
                    "an update, or the update failed its verification; then servers.update_weights(model) heals it",
                )
        self.state.connected({info.url: info.weight_version for info in infos})
        if self.router is not None:
            self.router.join([client.url for client in self.healthy])
        self._connected = True

    @property
    def info(self) -> ServerInfo:
        """What the first server reports of itself; connects on first use."""
        self.connect()
        return self.clients[0].info

    @property
    def vocab_size(self) -> int | None:
        """Number of valid token ids: the smallest over the servers."""
        return self._smallest("vocab_size")

    @property
    def max_prompt_tokens(self) -> int | None:
        """Longest prompt that every server takes."""
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
    def weight_version(self) -> int:
        """Version number of the weights that the last finished sync put on the servers (:class:`WeightState`)."""
        return self.state.weights.version

    @property
    def weight_sync(self) -> Any:
        """The :class:`~torchrl_sglang.WeightSync` through which weights are sent to these servers, or ``None``.

        The pool keeps a weak reference: the object lives as long as its users.
        """
        return None if self._weight_sync is None else self._weight_sync()

    @weight_sync.setter
    def weight_sync(self, sync: Any) -> None:
        self._weight_sync = None if sync is None else weakref.ref(sync)

    # ------------------------------------------------------------------ routing

    @property
    def healthy(self) -> tuple[SGLangClient, ...]:
        """The servers that requests are routed to."""
        return tuple(client for client in self.clients if self.state.server(client.url).is_routed)

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Servers that get no requests, with the reason."""
        return {url: server.reason for url, server in self.state.servers.items() if not server.is_routed}

    def quarantine(self, url: str, reason: str) -> ServerState:
        """Take a server out of routing until a weight update or :meth:`restore`.

        Returns:
            Its new state, for a later :meth:`restore`.
        """
        known = self.state.quarantined(url, reason)
        self._leave_router(url)
        return known

    def restore(
        self, url: str, *, based_on: ServerState, new_process_with: str | None = None, updated_to: str | None = None
    ) -> bool:
        """Put a server back into routing.

        Args:
            url: the server.
            based_on: its state when the caller found it fit to serve. If its state has changed since (for example
                because an update has quarantined it), the finding is out of date and the server stays as it is.
            new_process_with: the version it holds, if it was found to be a new process.
            updated_to: the version it holds, if another process was found to have updated it.

        Returns:
            Whether the finding was up to date: the server is routed now.

        Raises:
            ServerTimeoutError: the router does not admit it.
        """
        if self.router is not None and self.state.server(url).revision == based_on.revision:
            self.router.join([url])
        restored = self.state.restored(url, based_on=based_on, new_process_with=new_process_with, updated_to=updated_to)
        if not restored and not self.state.server(url).is_routed:
            self._leave_router(url)
        return restored

    def _leave_router(self, url: str) -> None:
        if self.router is not None:
            self.router.leave(url)

    def record_death(self, url: str, error: SGLangError) -> None:
        """Take a server that a request found gone out of routing; later requests look whether it is back."""
        self.state.died(url, f"it died while generating ({error})")
        self._dead_servers.postpone()
        self._leave_router(url)

    def poll_dead_servers(self) -> None:
        """Poll dead and dirty servers, at most every few seconds, and restore those that hold the current weights.

        If no server is left and another process is updating some, wait for it: as long as one step of an update may
        take (``ClientConfig.update_timeout_s``).
        """
        if self.state.weights.adapter is None:  # a new process has no adapter
            self._dead_servers.poll(self.clients)
        deadline = time.monotonic() + max(client.config.update_timeout_s for client in self.clients)
        while not self.healthy and self._is_updated_elsewhere and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            self._dead_servers.poll(self.clients)

    @property
    def _is_updated_elsewhere(self) -> bool:
        return any(server.phase == "dirty" for server in self.state.servers.values())

    def _server_returned(self, before: ServerState, version: str) -> None:
        if before.phase == "dirty":
            self.restore(before.url, based_on=before, updated_to=version)
        else:
            self.restore(before.url, based_on=before, new_process_with=version)

    def offload(self, url: str, tags: Iterable[str] = ()) -> None:
        """Take a server out of routing because it is about to release GPU memory, or has released ``tags`` of it."""
        self.state.memory_released(url, tags, "its GPU memory is offloaded: resume_memory() takes it back")
        self._leave_router(url)

    def refuse_while_offloaded(self) -> None:
        """Weights can't be sent to memory that is released.

        Raises:
            ConfigError: a server's memory is offloaded.
        """
        offloaded = [url for url, server in self.state.servers.items() if server.offloaded_tags]
        if offloaded:
            raise ConfigError(f"the GPU memory of {', '.join(offloaded)} is offloaded: resume_memory() first")

    # ------------------------------------------------------------------ generating

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

        Each server gets its share of the batch in one request; shares run side by side, and equal prompts go to the
        same server. A share whose server turns out to be dead is generated by the others.

        Args:
            ids_B_T: prompt token ids, checked before anything is sent.
            sampling: how tokens are drawn.
            return_logprobs: report the log-prob of every response token.
            prompt_logprobs: report those of the prompt too.
            timeout_s: seconds for the whole batch; ``None`` gives each of its requests
                ``ClientConfig.generate_timeout_s``.
            progress: called with the number of newly generated tokens while the batch runs.
            lora: name of a loaded adapter.
            media: images, videos and sounds of each prompt (not together with ``progress``).

        Returns:
            ``B * n`` replies, prompt-major, in the order of the prompts.

        Raises:
            ConfigError: a prompt that the servers can't serve; names its index and the limit.
            LethalPromptError: servers died on a prompt; names its index, and has the other prompts' replies.
            ServerError: a server failed in a way that leaves open whether requests ran, or no server is left.
        """
        require_number("timeout_s", timeout_s, optional=True, above=0)
        if len(ids_B_T) == 0:
            return []
        self.check(ids_B_T, sampling)
        lora, label = self.resolve_adapter(lora)
        batch = Batch(
            ids_B_T=ids_B_T,
            sampling=sampling,
            return_logprobs=return_logprobs,
            prompt_logprobs=prompt_logprobs,
            deadline=None if timeout_s is None else time.monotonic() + timeout_s,
            progress=progress,
            lora=lora,
            cache_salt=self.state.weights.cache_salt,
            media=media,
        )
        try:
            return self._accepted(self._dispatch_until_current(batch), label)
        except LethalPromptError as error:
            error.replies = {index: self._accepted(each, label) for index, each in error.replies.items()}
            raise

    def _accepted(
        self, replies: Sequence[GenerateReply], label: Callable[[GenerateReply], GenerateReply]
    ) -> list[GenerateReply]:
        refuse_mixed_weights(replies)
        for server in {reply.server for reply in replies}:
            versions = (version_number(reply.weight_version) for reply in replies if reply.server == server)
            self.state.replies_seen(versions, server)
        return [label(reply) for reply in replies]

    def _dispatch_until_current(self, batch: Batch) -> list[GenerateReply]:
        """Send a batch. Prompts that were answered with weights that nobody trained are generated again elsewhere.

        These are answers of a server that somebody else has restarted, which holds its checkpoint's weights again, and
        answers that a server gave after an update whose verification has failed since.
        """
        before = self.state.servers
        replies = self._dispatch(batch)
        self._reply_checks.await_verification(replies)
        wrong = [index for index, reply in enumerate(replies) if self._reply_checks.is_wrong(reply, before)]
        if not wrong:
            return replies
        n = batch.sampling.n
        prompts = sorted({index // n for index in wrong})
        _log.warning("%d prompts are generated again: their server held other weights than expected", len(prompts))
        again = self._dispatch_until_current(batch.part(prompts))
        for position, prompt in enumerate(prompts):
            replies[prompt * n : (prompt + 1) * n] = again[position * n : (position + 1) * n]
        return replies

    def _dispatch(self, batch: Batch) -> list[GenerateReply]:
        """Send a batch, and what a dead server left unanswered again, until every prompt has its replies."""
        self.poll_dead_servers()
        everything = range(len(batch.ids_B_T))
        through_router = batch.progress is None and self._router_forwards(batch.build(everything))

        def servers(consequence: str, num_requests: int) -> Sequence[SGLangClient]:
            return self._router_slots(num_requests) if through_router else self.require_healthy(consequence)

        def on_death(url: str, error: SGLangError) -> None:
            self.record_death(url, error)
            if len(self.clients) == 1:
                raise error

        run = BatchRun(batch, servers=servers, load=self._load, find_dead=self._find_dead, on_death=on_death)
        try:
            return run.replies()
        except RequestRejectedError as error:
            if self.router is None or not has_no_workers(error):
                raise
            message = f"no server is left behind the router at {self.router.url}, {run.unanswered}"
            raise ServerError(f"{message}. {error}", server=self.router.url) from error

    def stream(
        self, ids_T: Sequence[int], sampling: SamplingParams, *, return_logprobs: bool = True, lora: str | None = None
    ) -> Iterator[GenerateReply]:
        """Generate one sequence on the server with the least load; yield it as it grows, all tokens so far each time.

        Args:
            ids_T: prompt token ids.
            sampling: how tokens are drawn; ``n`` is 1.
            return_logprobs: report the log-prob of every response token.
            lora: name of a loaded adapter instead of the trainer's.

        Raises:
            ConfigError: a prompt that the servers can't serve.
            ServerError: no server is left, or the stream broke.
        """
        self.check([ids_T], sampling)
        self.poll_dead_servers()
        lora, label = self.resolve_adapter(lora)
        request = build_generate(
            [ids_T],
            sampling,
            return_logprobs=return_logprobs,
            stream=True,
            lora=lora,
            cache_salt=self.state.weights.cache_salt,
        )
        through_router = self._router_forwards(request)
        clients = self._router_slots(1) if through_router else self.require_healthy("the stream was not begun")
        with self._load.assign_one(clients) as client:
            sequence = StreamedReply(client.url)
            before = self.state.servers
            for event in client.stream(request):
                reply = parse_one(sequence.add(event), server=client.url, return_logprobs=return_logprobs)
                refuse_mixed_weights([reply])
                if self._reply_checks.is_wrong(reply, before):
                    raise ServerError(
                        f"{reply.server} held other weights than expected: ask again", server=reply.server
                    )
                yield label(reply)

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
        for client in self.clients:
            check_sampling(sampling, vocab_size=vocab_size, info=client.info)
        if sampling.min_new_tokens and vocab_size is not None:
            self._end_tokens.check(self.info, vocab_size)
        check_prompts(
            ids_B_T,
            max_new_tokens=sampling.max_new_tokens,
            vocab_size=vocab_size,
            max_prompt_tokens=self.max_prompt_tokens,
            context_length=self.context_length,
        )

    def resolve_adapter(self, lora: str | None) -> tuple[str | None, Callable[[GenerateReply], GenerateReply]]:
        """Decide which adapter a request uses.

        Args:
            lora: the adapter that the request names; one that names none uses the trainer's, if there is one.

        Returns:
            The adapter's name, and a function that labels a reply with the weight version that the adapter stands for.
        """
        adapter = self.state.weights.adapter
        if lora is not None or adapter is None:
            return lora, lambda reply: reply
        return adapter.name, partial(label_with_version, adapter.version)

    def require_healthy(self, consequence: str) -> Sequence[SGLangClient]:
        """The servers to send to.

        Args:
            consequence: what it means that none is left, for the error.

        Raises:
            ServerError: none is left; says why for each one.
        """
        clients = self.healthy
        if not clients:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self.quarantined.items())
            raise ServerError(f"no server is left, {consequence}. {reasons}")
        return clients

    def _router_forwards(self, request: HttpRequest) -> bool:
        """Whether there is a router, and a request keeps its meaning when it goes through it."""
        if self.router is None:
            return False
        filled_in = frozenset[str]().union(*(client.info.preferred_sampling for client in self.clients))
        return router_forwards(request, filled_in=filled_in)

    def _router_slots(self, num_requests: int) -> Sequence[SGLangClient]:
        """The router's client, once per request that a batch is divided into."""
        assert self.router is not None
        return [self.router.client] * min(num_requests, MAX_REQUESTS)

    def _find_dead(self, client: SGLangClient, error: SGLangError) -> SGLangClient | None:
        """The server that a failed request was on, if it is known to be dead: only then the request is sent again."""
        if self.router is None or client is not self.router.client:
            return dead_server(client, error)
        url = worker_in_error(error, [each.url for each in self.clients])
        worker = next((each for each in self.clients if each.url == url), None)
        return worker if worker is not None and is_gone(worker) else None

    def close(self) -> None:
        """Close all idle connections."""
        for client in self.clients:
            client.close()
        if self.router is not None:
            self.router.close()
