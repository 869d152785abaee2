"""Sends the shares of a batch to servers side by side, and decides which prompts may be sent again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ProtocolError, ServerLostError, ServerUnreachableError, SGLangError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool.balancing import Share
from torchrl_sglang.protocol.control import build_ready
from torchrl_sglang.protocol.messages import GenerateReply

__all__ = ["DispatchResult", "dead_server", "dispatch_shares", "is_gone"]

_CLOSING_S = 3.0
_LIVES_S = 0.3
_ASK_AGAIN_S = 0.05


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


def dispatch_shares(
    shares: Sequence[Share],
    n: int,
    send: Callable[[SGLangClient, Sequence[int]], list[GenerateReply]],
    find_dead: Callable[[SGLangClient, SGLangError], SGLangClient | None],
) -> DispatchResult:
    """Send every share and sort the outcomes.

    Args:
        shares: servers and prompt indices.
        n: sequences per prompt.
        send: sends one share and returns its replies, prompt-major.
        find_dead: returns the server that a failed request was on, if it is known to be dead.
    """
    outcomes = side_by_side({str(i): partial(send, client, share) for i, (client, share) in enumerate(shares)})
    result = DispatchResult()
    for outcome, (client, share) in zip(outcomes.values(), shares, strict=True):
        if outcome.error is None:
            replies = outcome.unwrap()
            result.replies.update((index, replies[i * n : (i + 1) * n]) for i, index in enumerate(share))
        elif dead := find_dead(client, outcome.error):
            result.lost.append((list(share), dead.url, outcome.error))
        else:
            result.failure = result.failure or outcome.error
    return result


def dead_server(client: SGLangClient, error: SGLangError) -> SGLangClient | None:
    """Return ``client`` if its server is dead after ``error``: then no reply to the request can exist."""
    if isinstance(error, ServerUnreachableError):
        return client
    # A lost connection or half a reply leaves open whether the server still runs.
    return client if isinstance(error, (ServerLostError, ProtocolError)) and is_gone(client) else None


def is_gone(client: SGLangClient) -> bool:
    """Whether nothing listens at a server's address any more.

    A process that is ending may drop connections before its port is closed, or answer once more on a connection that is
    open. So one that drops them is asked again, and one that answers must do so for a moment.
    """
    deadline = time.monotonic() + _CLOSING_S
    answers_since = None
    while True:
        try:
            client.send(build_ready())
        except ServerUnreachableError:
            return True
        except (ServerLostError, ProtocolError):
            answers_since = None
            if time.monotonic() > deadline:
                return False
        except SGLangError:
            return False
        else:
            answers_since = answers_since or time.monotonic()
            if time.monotonic() - answers_since >= _LIVES_S:
                return False
        time.sleep(_ASK_AGAIN_S)
