"""One round of a batch: all shares side by side, and what became of each; only a dead server's share may go again."""

from __future__ import annotations

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


@dataclass(slots=True, kw_only=True)
class DispatchResult:
    """What became of the shares of one round.

    Attributes:
        replies: per prompt that was answered, its ``n`` replies.
        retry: prompts whose server is known dead, ascending: no answer to them can exist any more.
        deaths: per URL of those servers, the error they left.
        failure: an error that leaves open whether requests ran.
    """

    replies: dict[int, list[GenerateReply]] = field(default_factory=dict)
    retry: list[int] = field(default_factory=list)
    deaths: dict[str, SGLangError] = field(default_factory=dict)
    failure: SGLangError | None = None


def dispatch_shares(
    shares: Sequence[Share],
    n: int,
    run: Callable[[SGLangClient, Sequence[int]], list[GenerateReply]],
    find_dead: Callable[[SGLangClient, SGLangError], SGLangClient | None],
) -> DispatchResult:
    """Send every share and sort out the outcomes.

    Args:
        shares: servers and prompt indices.
        n: sequences per prompt.
        run: sends one share, returns its replies prompt-major.
        find_dead: the server a failed request was on, when that is known to be dead.
    """
    outcomes = side_by_side({str(i): partial(run, client, share) for i, (client, share) in enumerate(shares)})
    done = DispatchResult()
    for outcome, (client, share) in zip(outcomes.values(), shares, strict=True):
        if outcome.error is None:
            answers = outcome.unwrap()
            done.replies.update((index, answers[i * n : (i + 1) * n]) for i, index in enumerate(share))
        elif dead := find_dead(client, outcome.error):
            done.deaths[dead.url] = outcome.error
            done.retry.extend(share)
        else:
            done.failure = done.failure or outcome.error
    done.retry.sort()
    return done


def dead_server(client: SGLangClient, error: SGLangError) -> SGLangClient | None:
    """``client`` if the request failed with the death of its server: then no answer to it can exist."""
    if isinstance(error, ServerUnreachableError):
        return client
    # Ended before its reply, or in the middle of it?
    return client if isinstance(error, (ServerLostError, ProtocolError)) and is_gone(client) else None


def is_gone(client: SGLangClient) -> bool:
    """Whether nothing listens at a server's address any more."""
    try:
        client.send(build_ready())
    except ServerUnreachableError:
        return True
    except SGLangError:
        return False
    return False
