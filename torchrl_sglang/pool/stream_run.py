"""Streams one sequence, on another server as long as no token of it has been shown."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import LethalPromptError, ProtocolError, ServerError, ServerUnreachableError, SGLangError
from torchrl_sglang.pool.balancing import LoadTracker
from torchrl_sglang.pool.dispatch import never_ran
from torchrl_sglang.pool.reply_weights import ReplyChecks
from torchrl_sglang.pool.state import PoolState
from torchrl_sglang.protocol.generate import parse_one
from torchrl_sglang.protocol.messages import GenerateReply, HttpRequest
from torchrl_sglang.protocol.stream_events import StreamedReply

__all__ = ["StreamRun"]


class _AskAgainError(ServerError):
    """The server held weights that nobody trained, or left the pool."""


class StreamRun:
    """One stream on its way.

    Args:
        request: asks for the stream.
        timeout_s: longest time between two events, in seconds.
        return_logprobs: as in the request.
        state: the pool's records.
        load: counts what is under way.
        checks: tell whether a reply was made with the weights that its server was known to hold.
        servers: called with what it means that none is left and with the number of requests; returns the servers to
            send to, or raises.
        find_dead: returns the server that a failed request was on, if it is known to be dead.
        on_death: called with the URL of a server that died, and the error it left; raises if the stream is to end.
        has_left: whether a server is leaving the pool, or has left it, also if another one has joined at its URL.
        key: name of the conversation.
    """

    def __init__(
        self,
        request: HttpRequest,
        *,
        timeout_s: float,
        return_logprobs: bool,
        state: PoolState,
        load: LoadTracker,
        checks: ReplyChecks,
        servers: Callable[[str, int], Sequence[SGLangClient]],
        find_dead: Callable[[SGLangClient, SGLangError], SGLangClient | None],
        on_death: Callable[[str, SGLangError], None],
        has_left: Callable[[SGLangClient], bool],
        key: Hashable | None = None,
    ) -> None:
        self._request = request
        self._timeout_s = timeout_s
        self._return_logprobs = return_logprobs
        self._state = state
        self._load = load
        self._checks = checks
        self._servers = servers
        self._find_dead = find_dead
        self._on_death = on_death
        self._has_left = has_left
        self._key = key
        self._deaths = 0
        self._never_reached: SGLangError | None = None

    def replies(self) -> Generator[GenerateReply, None, None]:
        """The sequence as it grows, all tokens so far each time.

        A stream that breaks because its server died begins anew on another server, unless a reply was yielded before.

        Raises:
            LethalPromptError: two servers died on the prompt.
            ServerError: no server is left, or one failed in a way that leaves open whether the request runs.
            ProtocolError: the stream ended without a finished sequence.
        """
        ids_T = (self._request.body or {})["input_ids"][0]
        while True:
            has_begun = False
            clients = self._servers("the stream was not begun", 1)
            with self._load.assign_one(clients, key=self._key, ids_T=ids_T) as client:
                try:
                    for reply in self._replies_of(client):
                        has_begun = True
                        yield reply
                    return
                except _AskAgainError as error:
                    if has_begun:
                        raise ServerError(f"{error}: ask again", server=client.url) from error
                except SGLangError as error:
                    self._record_failure(client, error, has_begun=has_begun)

    def _replies_of(self, client: SGLangClient) -> Generator[GenerateReply, None, None]:
        sequence = StreamedReply(client.url)
        before = self._state.servers
        for event in client.stream(self._request, timeout_s=self._timeout_s):
            reply = parse_one(sequence.add(event), server=client.url, return_logprobs=self._return_logprobs)
            self._checks.await_verification([reply])
            if self._checks.is_wrong(reply, before):
                left = self._has_left(client)
                why = "was removed from the pool" if left else "held other weights than expected"
                raise _AskAgainError(f"{reply.server} {why}", server=reply.server)
            yield reply
        if not sequence.is_finished:
            raise ProtocolError(f"{client.url} ended a stream without a finished sequence", server=client.url)

    def _record_failure(self, client: SGLangClient, error: SGLangError, *, has_begun: bool) -> None:
        """Record a dead server; raises unless the request may be sent again."""
        dead = self._find_dead(client, error)
        if dead is None:
            again = isinstance(error, ServerUnreachableError) and not error.is_local and self._never_reached is None
            if has_begun or not again:
                raise error
            self._never_reached = error  # nothing ran, and the server answers again
            return
        if self._has_left(dead):
            if has_begun:
                raise _AskAgainError(f"{dead.url} was removed from the pool: ask again", server=dead.url) from error
            return
        self._on_death(dead.url, error)
        if has_begun:
            raise error
        if never_ran(error):  # it was dead before, or is a new process without the adapter
            return
        self._deaths += 1
        if self._deaths > 1:
            raise LethalPromptError(
                f"two servers died on this prompt ({error}): it is sent to no further server. The log of a dead server "
                "has the reason",
                server=dead.url,
                prompts={0: str(error)},
            ) from error
