"""Sends the shares of a batch to servers side by side, and decides which prompts may be sent again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import (
    ProtocolError,
    RequestRejectedError,
    ServerLostError,
    ServerUnreachableError,
    SGLangError,
)
from torchrl_sglang.parallel import work_through
from torchrl_sglang.pool.balancing import Share
from torchrl_sglang.protocol.control import build_ready
from torchrl_sglang.protocol.messages import GenerateReply

__all__ = [
    "DispatchResult",
    "dead_server",
    "dispatch_shares",
    "is_gone",
    "lacks_adapter",
    "never_ran",
    "split_share",
]

_MAX_SEQUENCES = 256
"""Of one request: 2 MB of JSON per 1,000 tokens each way, and large enough that its overhead does not show."""
_REQUESTS_IN_FLIGHT = 8
"""Per server. With 2,048 sequences sent, a server has enough waiting to fill its batch at any time."""

_CLOSING_S = 3.0
_LIVES_S = 0.3
_ASK_AGAIN_S = 0.05
_MISSED = (502, 503, 504)


@dataclass(slots=True, kw_only=True)
class DispatchResult:
    """What became of the shares.

    Attributes:
        replies: per answered prompt, its ``n`` replies.
        lost: shares whose server is known to be dead, with its URL and the error that it left: no reply to them can
            exist any more.
        failure: an error after which requests may or may not have run.
    """

    replies: dict[int, list[GenerateReply]] = field(default_factory=dict)
    lost: list[tuple[list[int], str, SGLangError]] = field(default_factory=list)
    failure: SGLangError | None = None


@dataclass(frozen=True, slots=True)
class _Lost:
    """A request that a dead server left unanswered."""

    url: str
    error: SGLangError


def dispatch_shares(
    shares: Sequence[Share],
    n: int,
    send: Callable[[SGLangClient, Sequence[int]], list[GenerateReply]],
    find_dead: Callable[[SGLangClient, SGLangError], SGLangClient | None],
) -> DispatchResult:
    """Send every share in requests of bounded size, and sort the outcomes.

    One request for thousands of sequences would be gigabytes of JSON, and a single failure would lose all of it. Each
    server has several requests under way, so that its batch does not run empty between them.

    Args:
        shares: servers and prompt indices.
        n: sequences per prompt.
        send: sends some prompts in one request and returns their replies, prompt-major.
        find_dead: returns the server that a failed request was on, if it is known to be dead.
    """
    gone: set[str] = set()

    def send_part(client: SGLangClient, part: Sequence[int]) -> list[GenerateReply] | _Lost:
        if client.url in gone:
            return _Lost(client.url, ServerUnreachableError(f"{client.url} is dead", server=client.url))
        try:
            return send(client, part)
        except SGLangError as error:
            dead = find_dead(client, error)
            if dead is None and isinstance(error, ServerUnreachableError) and not error.is_local:
                return send(client, part)  # nothing ran, and the server answers again
            if dead is None:
                raise
            gone.add(dead.url)
            return _Lost(dead.url, error)

    parts = [(client, split_share(share, n)) for client, share in shares]
    outcomes = work_through(
        [[partial(send_part, client, part) for part in pieces] for client, pieces in parts],
        workers=_REQUESTS_IN_FLIGHT,
    )
    result = DispatchResult()
    for (_, pieces), queue in zip(parts, outcomes, strict=True):
        for part, outcome in zip(pieces, queue, strict=True):
            if outcome is None:  # not sent, because another request failed
                continue
            if outcome.error is not None:
                result.failure = result.failure or outcome.error
                continue
            answer = outcome.unwrap()
            if isinstance(answer, _Lost):
                result.lost.append((part, answer.url, answer.error))
            else:
                result.replies.update((index, answer[i * n : (i + 1) * n]) for i, index in enumerate(part))
    return result


def split_share(share: Sequence[int], n: int) -> list[list[int]]:
    """Divide prompts into requests of at most 256 sequences; the sequences of one prompt stay together.

    Examples:
        >>> [len(part) for part in split_share(range(600), n=1)]
        [256, 256, 88]
        >>> split_share([0, 1], n=1000)
        [[0], [1]]
    """
    size = max(1, _MAX_SEQUENCES // n)
    return [list(share[start : start + size]) for start in range(0, len(share), size)]


def never_ran(error: SGLangError) -> bool:
    """Whether a request that ended with this error cannot have run: it reached no server, or the server refused it.

    A 500 or 503 is no refusal: SGLang (0.5.20, 0.5.23) answers so when its scheduler has ended a request.
    """
    return _is_refusal(error) or isinstance(error, ServerUnreachableError)


def lacks_adapter(error: SGLangError, name: str) -> bool:
    r"""Whether a server has refused a request because it does not have this adapter.

    SGLang (0.5.20, 0.5.23) answers 400, in a stream too. The first line of its message names the adapter; the next one
    lists those that it has.

    Examples:
        >>> detail = "Got LoRA adapter that has never been loaded: mine\nAll loaded adapters: dict_keys(['theirs'])."
        >>> error = RequestRejectedError("", status=400, detail=detail)
        >>> [lacks_adapter(error, name) for name in ("mine", "min", "theirs")]
        [True, False, False]
    """
    if not isinstance(error, RequestRejectedError) or not _is_refusal(error):
        return False
    named = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w-]|\.\w)")
    return named.search(error.detail.partition("\n")[0]) is not None


def _is_refusal(error: SGLangError) -> bool:
    return isinstance(error, RequestRejectedError) and not error.is_from_proxy and error.status < 500


def dead_server(client: SGLangClient, error: SGLangError) -> SGLangClient | None:
    """Return ``client`` if its server is dead after ``error``: then no reply to the request can exist.

    A second request confirms it. A failure of this machine says nothing about the server; a lost connection or half a
    reply leaves open whether it still runs. A proxy before the server says that it does not reach it.
    """
    if isinstance(error, ServerUnreachableError) and error.is_local:
        return None
    may_be_dead = isinstance(error, (ServerUnreachableError, ServerLostError, ProtocolError)) or _is_missed(error)
    return client if may_be_dead and is_gone(client) else None


def _is_missed(error: SGLangError) -> bool:
    """Whether a proxy has answered that it does not reach the server behind it."""
    return isinstance(error, RequestRejectedError) and error.is_from_proxy and error.status in _MISSED


def is_gone(client: SGLangClient) -> bool:
    """Whether nothing listens at a server's address any more, or behind the proxy there.

    A process that is ending may drop connections before its port is closed, or answer once more on a connection that is
    open. So one that drops them is asked again, and one that answers must do so for a moment.
    """
    deadline = time.monotonic() + _CLOSING_S
    answers_since = None
    while True:
        try:
            client.send(build_ready())
        except ServerUnreachableError as error:
            return not error.is_local
        except (ServerLostError, ProtocolError):
            answers_since = None
            if time.monotonic() > deadline:
                return False
        except SGLangError as error:
            if not _is_missed(error):
                return False
            answers_since = None
            if time.monotonic() > deadline:
                return True
        else:
            answers_since = answers_since or time.monotonic()
            if time.monotonic() - answers_since >= _LIVES_S:
                return False
        time.sleep(_ASK_AGAIN_S)
