"""Several servers behind one ``generate``: divides batches over them and retries only what cannot have run."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.config.checking import require, require_number
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
from torchrl_sglang.pool.member_file import MemberFile
from torchrl_sglang.pool.membership import Membership
from torchrl_sglang.pool.reply_weights import ReplyChecks
from torchrl_sglang.pool.router_client import MAX_REQUESTS, RouterClient
from torchrl_sglang.pool.state import PoolState, ServerState
from torchrl_sglang.pool.stream_run import StreamRun
from torchrl_sglang.pool.update_lock import UpdateLock
from torchrl_sglang.protocol.generate import build_generate
from torchrl_sglang.protocol.limits import check_prompts, check_sampling
from torchrl_sglang.protocol.media import Media
from torchrl_sglang.protocol.messages import GenerateReply, HttpRequest, ServerInfo
from torchrl_sglang.protocol.router import has_no_workers, router_forwards, worker_in_error
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
        router: as given.
        state: the records of the servers and of the weights on them (:class:`~torchrl_sglang.pool.PoolState`), which
            rollout and weight sync share.
        reply_checks: tells whether a reply was made with the weights that its server was known to hold.
        balancer: chooses servers; :meth:`LoadTracker.pick` does it for requests that are sent past :meth:`generate`.
        update_lock: held while weights are synced and while a crashed server is restarted, so that no update goes to a
            server that is still loading.
    """

    def __init__(self, clients: Sequence[SGLangClient], *, router: RouterClient | None = None) -> None:
        if not clients:
            raise ConfigError("a pool needs at least one server")
        urls = [client.url for client in clients]
        if len(set(urls)) != len(urls):
            raise ConfigError(f"the same server is named twice: {urls}")
        self.router = router
        self._init_runtime(clients)

    def _init_runtime(self, clients: Sequence[SGLangClient], copied_from: MemberFile | None = None) -> None:
        self.state = PoolState(client.url for client in clients)
        self._membership = Membership(self, clients, copied_from)
        self.update_lock = UpdateLock()
        self._weight_sync: weakref.ref[Any] | None = None
        self._connected = False
        self.balancer = LoadTracker(lambda: self.require_healthy("nothing was sent"))
        self._end_tokens = EndTokens()
        self._dead_servers = DeadServerTracker(self.state, self._server_returned, self._membership.current_versions)
        update_timeout_s = max(client.config.update_timeout_s for client in self.clients)
        self.reply_checks = ReplyChecks(self.state, self.leave_router, timeout_s=update_timeout_s)
        renew_in_forked_children(self)

    def renew_after_fork(self) -> None:
        """Start with a state and locks of its own, as a pickled copy does; called in a forked child."""
        self._init_runtime(self.clients, self._membership.file_of_copies())

    def __getstate__(self) -> dict[str, Any]:
        return {"clients": self.clients, "router": self.router, "members": self._membership.file_of_copies().path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.router = state["router"]
        self._init_runtime(state["clients"], MemberFile(state["members"]))

    def __repr__(self) -> str:
        return f"SGLangPool({[client.url for client in self.clients]})"

    # ------------------------------------------------------------------ the servers

    @property
    def clients(self) -> tuple[SGLangClient, ...]:
        """All servers, also quarantined ones, and those that are about to leave."""
        return self._membership.clients

    def add(self, urls: str | Sequence[str]) -> tuple[str, ...]:
        """Take running servers into the pool, while the others generate.

        A newcomer gets requests when it holds the weights that the others hold: at once if it holds them already, or
        if they can be sent to it now (see :meth:`WeightSync.bring_up_to_date`); otherwise after the next weight update,
        which it takes part in. Only the newcomer is paused for it. A weight update under way is waited for.

        Args:
            urls: base URL, or several. The servers must have the keys that the others have.

        Returns:
            Their base URLs.

        Raises:
            ConfigError: a server is a member already, serves another model, or was started with other settings that
                matter here; or the others' GPU memory is offloaded. The pool is as before.
            ServerError: a server can't be reached, or ended while it was brought up to date. The pool is as before.
        """
        return self._membership.add([urls] if isinstance(urls, str) else list(urls))

    def remove(self, urls: str | Sequence[str], *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take servers out of the pool, while the others generate. The processes go on running.

        They get no new requests. Those that they have are finished, or generated again by the other servers: each
        prompt gets its answer once.

        Args:
            urls: base URL, or several.
            drain: wait until they have finished the requests that they have, also those of other clients. With
                ``False`` their requests are aborted now.
            timeout_s: longest wait, in seconds; what is unfinished then is aborted. ``None`` is the longest time that a
                request may take.

        Raises:
            ConfigError: a server is no member, or no other one would be left that takes requests. Nothing was changed.
        """
        self.take_out([urls] if isinstance(urls, str) else list(urls), drain=drain, timeout_s=timeout_s)

    def take_out(
        self,
        urls: Sequence[str],
        *,
        drain: bool,
        timeout_s: float | None,
        on_left: Callable[[str], None] = lambda url: None,
    ) -> None:
        """:meth:`remove`, for the owner of the processes.

        Args:
            urls: base URLs.
            drain: as there.
            timeout_s: as there.
            on_left: called for each server when nothing is sent to it any more.
        """
        self._membership.remove(urls, drain=drain, timeout_s=timeout_s, on_left=on_left)

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
        self._membership.refresh()
        clients = self.clients  # of a copy, more may join meanwhile
        outcomes = side_by_side({client.url: client.connect for client in clients})
        infos = [outcomes[client.url].unwrap() for client in clients]
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
        return {url: server.why_not_routed for url, server in self.state.servers.items() if not server.is_routed}

    def quarantine(self, url: str, reason: str) -> ServerState:
        """Take a server out of routing until a weight update or :meth:`restore`.

        Returns:
            Its new state, for a later :meth:`restore`.
        """
        known = self.state.quarantined(url, reason)
        self.leave_router(url)
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
            self.leave_router(url)
        if restored:
            self._membership.served(url)
        return restored

    def join_router(self, url: str) -> None:
        """Tell the router, if there is one, that a server gets requests."""
        if self.router is not None:
            self.router.join([url])

    def leave_router(self, url: str) -> None:
        """Tell the router, if there is one, that a server gets no requests."""
        if self.router is not None:
            self.router.leave(url)

    def record_death(self, url: str, error: SGLangError) -> None:
        """Take a server that a request found gone out of routing; later requests look whether it is back."""
        self.state.died(url, f"it died while generating ({error})")
        self._dead_servers.postpone()
        self.leave_router(url)

    def poll_dead_servers(self) -> None:
        """Poll dead and dirty servers, at most every few seconds, and restore those that hold the current weights.

        If no server is left and another process is updating some, wait for it: as long as one step of an update may
        take (``ClientConfig.update_timeout_s``).
        """
        self._membership.refresh()
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
        if before.phase in ("dirty", "joining"):
            self.restore(before.url, based_on=before, updated_to=version)
        else:
            self.restore(before.url, based_on=before, new_process_with=version)

    def offload(self, url: str, tags: Iterable[str] = ()) -> None:
        """Take a server out of routing because it is about to release GPU memory, or has released ``tags`` of it."""
        self.state.memory_released(url, tags, "its GPU memory is offloaded: resume_memory() takes it back")
        self.leave_router(url)

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
        keys: Sequence[Hashable] | None = None,
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
            keys: names of the prompts' conversations; equal names go to the server that has the conversation in its
                cache. Without names a prompt that continues an earlier one goes where that went.

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
            keys=keys,
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
        self.reply_checks.await_verification(replies)
        wrong = [index for index, reply in enumerate(replies) if self.reply_checks.is_wrong(reply, before)]
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
        through_router = batch.progress is None and self._router_forwards(batch.build(range(len(batch.ids_B_T))))
        run = BatchRun(
            batch,
            servers=self._targets(through_router=through_router),
            load=self.balancer,
            find_dead=self._find_dead,
            on_death=self._on_death,
            has_left=self.state.has_left,
        )
        with self._no_workers_means(lambda: run.unanswered):
            return run.replies()

    def _targets(self, *, through_router: bool) -> Callable[[str, int], Sequence[SGLangClient]]:
        """Looks for dead servers that are back; then returns the servers to send to, once per request if the router."""
        self.poll_dead_servers()
        weights = self.state.weights
        self.balancer.affinity.weights_are(max(weights.version, weights.newest_seen))

        def servers(consequence: str, num_requests: int) -> Sequence[SGLangClient]:
            return self._router_slots(num_requests) if through_router else self.require_healthy(consequence)

        return servers

    def _on_death(self, url: str, error: SGLangError) -> None:
        self.record_death(url, error)
        if len(self.clients) == 1:
            raise error

    @contextmanager
    def _no_workers_means(self, consequence: str | Callable[[], str]) -> Iterator[None]:
        """Say what it means that the router has no worker left."""
        try:
            yield
        except RequestRejectedError as error:
            if self.router is None or not has_no_workers(error):
                raise
            said = consequence if isinstance(consequence, str) else consequence()
            message = f"no server is left behind the router at {self.router.url}, {said}"
            raise ServerError(f"{message}. {error}", server=self.router.url) from error

    def stream(
        self,
        ids_T: Sequence[int],
        sampling: SamplingParams,
        *,
        return_logprobs: bool = True,
        timeout_s: float | None = None,
        lora: str | None = None,
        media: Media | None = None,
        key: Hashable | None = None,
    ) -> Generator[GenerateReply, None, None]:
        """Generate one sequence on the server with the least load; yield it as it grows, all tokens so far each time.

        As long as nothing was yielded, the sequence of a server that turns out to be dead is generated by another one.
        Closing the generator ends the request on the server.

        Args:
            ids_T: prompt token ids, checked before anything is sent.
            sampling: how tokens are drawn; ``n`` is 1.
            return_logprobs: report the log-prob of every response token.
            timeout_s: seconds between two events; ``None`` is ``ClientConfig.generate_timeout_s``.
            lora: name of a loaded adapter instead of the trainer's.
            media: images, videos and sounds of the prompt.
            key: name of the conversation, see :meth:`generate`.

        Raises:
            ConfigError: a prompt that the servers can't serve.
            LethalPromptError: two servers died on the prompt.
            ServerError: no server is left, or the stream broke.
            WeightSyncError: tokens were generated with half-updated weights.
        """
        require_number("timeout_s", timeout_s, optional=True, above=0)
        require(sampling.n == 1, f"a stream carries one sequence, got n={sampling.n}")
        self.check([ids_T], sampling)
        lora, label = self.resolve_adapter(lora)
        request = build_generate(
            [ids_T],
            sampling,
            return_logprobs=return_logprobs,
            stream=True,
            lora=lora,
            cache_salt=self.state.weights.cache_salt,
            media=None if media is None else [media],
        )
        limit_s = max(client.config.generate_limit_s() for client in self.clients)
        run = StreamRun(
            request,
            timeout_s=limit_s if timeout_s is None else timeout_s,
            return_logprobs=return_logprobs,
            state=self.state,
            load=self.balancer,
            checks=self.reply_checks,
            servers=self._targets(through_router=self._router_forwards(request)),
            find_dead=self._find_dead,
            on_death=self._on_death,
            key=key,
        )
        return self._stream(run, label)

    def _stream(
        self, run: StreamRun, label: Callable[[GenerateReply], GenerateReply]
    ) -> Generator[GenerateReply, None, None]:
        with self._no_workers_means("the stream was not begun"):
            for reply in run.replies():
                yield self._accepted([reply], label)[0]

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
            if self.state.has_left(client.url) and not isinstance(error, RequestRejectedError):
                return client
            return dead_server(client, error)
        url = worker_in_error(error, self.state.known_urls)
        if url is None:
            return None
        worker = next((each for each in self.clients if each.url == url), SGLangClient(url))
        return worker if self.state.has_left(url) or is_gone(worker) else None

    def close(self) -> None:
        """Close all idle connections."""
        for client in self.clients:
            client.close()
        if self.router is not None:
            self.router.close()
