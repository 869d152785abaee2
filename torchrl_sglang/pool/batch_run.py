"""Sends a batch until every prompt has its replies, and finds the prompts that servers die on.

A request during which a server died is not sent to the next server unchanged: one of its prompts may be the reason.
Each of several is first sent alone, for a few tokens. A server that dies on one prompt alone, after another died on a
request with it, names that prompt: it is sent to no further server. The others are sent in halves, and one by one if a
server dies once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import LethalPromptError, ServerUnreachableError, SGLangError
from torchrl_sglang.pool.balancing import LoadTracker, Share
from torchrl_sglang.pool.batch import Batch
from torchrl_sglang.pool.dispatch import DispatchResult, dispatch_shares, never_ran
from torchrl_sglang.protocol.messages import GenerateReply

__all__ = ["BatchRun"]


@dataclass(slots=True)
class _Suspects:
    """Prompts of one request during which a server died, or of two such requests."""

    prompts: list[int]
    deaths: int = 1
    tested: bool = field(default=False)

    def pieces(self) -> list[list[int]]:
        """The requests in which they are sent again."""
        if self.deaths > 1:
            return [[index] for index in self.prompts]
        half = -(-len(self.prompts) // 2)
        return [piece for piece in (self.prompts[:half], self.prompts[half:]) if piece]


class BatchRun:
    """One batch on its way.

    Args:
        batch: the prompts and their settings.
        servers: called with what it means that none is left and with the number of requests; returns the servers to
            send to, or raises.
        load: counts what is under way.
        find_dead: returns the server that a failed request was on, if it is known to be dead.
        on_death: called with the URL of a server that died, and the error it left; raises if the batch is to end.
        has_left: whether a server is leaving the pool, or has left it: what it leaves unanswered says nothing about
            the prompts.
    """

    def __init__(
        self,
        batch: Batch,
        *,
        servers: Callable[[str, int], Sequence[SGLangClient]],
        load: LoadTracker,
        find_dead: Callable[[SGLangClient, SGLangError], SGLangClient | None],
        on_death: Callable[[str, SGLangError], None],
        has_left: Callable[[SGLangClient], bool] = lambda client: False,
    ) -> None:
        self._batch = batch
        self._servers = servers
        self._load = load
        self._find_dead = find_dead
        self._on_death = on_death
        self._has_left = has_left
        self._replies: dict[int, list[GenerateReply]] = {}
        self._lethal: dict[int, SGLangError] = {}
        self._left: set[str] = set()

    def replies(self) -> list[GenerateReply]:
        """Send everything; the replies, prompt-major.

        Raises:
            LethalPromptError: servers died on a prompt; the others have their replies in the error.
            ServerError: no server is left, or one failed in a way that leaves open whether requests ran.
        """
        num_prompts, n = len(self._batch.ids_B_T), self._batch.sampling.n
        suspects: list[_Suspects] = []
        waiting = list(range(num_prompts))
        while waiting:
            clients = self._servers(self.unanswered, len(waiting))
            with self._load.assign(clients, self._batch.ids_B_T, waiting, n, self._batch.keys) as shares:
                result = self._send(shares)
            waiting = []
            for share, url, error in result.lost:
                if self._is_innocent(url, error):
                    waiting.extend(share)
                else:
                    suspects.append(_Suspects(share))
            waiting.sort()
        while suspects:
            suspects.extend(self._send_suspects(suspects.pop(0)))
        if self._lethal:
            raise self._lethal_error()
        return [reply for index in range(num_prompts) for reply in self._replies[index]]

    @property
    def unanswered(self) -> str:
        """Which prompts have no replies yet, and which of them servers died on."""
        num_prompts = len(self._batch.ids_B_T)
        open_ = [index for index in range(num_prompts) if index not in self._replies]
        text = f"{len(open_)} of {num_prompts} prompts have no answer: {_shorten(open_)}"
        return f"{text}; servers died on prompt {_shorten(sorted(self._lethal))}" if self._lethal else text

    def _send(self, shares: Sequence[Share], batch: Batch | None = None) -> DispatchResult:
        """Send shares side by side, keep the replies to the batch itself, and take note of deaths."""
        batch = batch or self._batch
        self._left = set()
        result = dispatch_shares(shares, batch.sampling.n, partial(self._send_part, batch), self._find_dead_or_left)
        if batch is self._batch:
            self._replies.update(result.replies)
        for url, error in {url: error for _, url, error in reversed(result.lost)}.items():  # the first of each server
            if url not in self._left:
                self._on_death(url, error)
        if result.failure is not None:
            raise result.failure
        return result

    def _send_part(self, batch: Batch, client: SGLangClient, part: Sequence[int]) -> list[GenerateReply]:
        if self._has_left(client):  # since the shares were divided
            raise ServerUnreachableError(f"{client.url} is leaving the pool", server=client.url)
        return batch.send(client, part)

    def _find_dead_or_left(self, client: SGLangClient, error: SGLangError) -> SGLangClient | None:
        """Note a server that has left at once: when the other shares are answered, it may have been added again."""
        dead = self._find_dead(client, error)
        if dead is not None and self._has_left(dead):
            self._left.add(dead.url)
        return dead

    def _is_innocent(self, url: str, error: SGLangError) -> bool:
        """Whether prompts were lost for another reason than themselves: they never ran, or their server left."""
        return never_ran(error) or url in self._left

    def _send_suspects(self, group: _Suspects) -> list[_Suspects]:
        """Send a group again in smaller requests; returns the groups of those during which a server died."""
        if len(group.prompts) > 1 and not group.tested:
            self._test_alone(group)
        pieces, left = group.pieces(), []
        while pieces:
            clients = self._servers(self.unanswered, len(pieces))
            shares = list(zip(clients, pieces, strict=False))  # at most one request per server
            pieces = pieces[len(shares) :]
            with self._load.count(shares, self._batch.sampling.n):
                result = self._send(shares)
            for share, url, error in result.lost:
                if self._is_innocent(url, error):
                    pieces.append(share)
                elif len(share) == 1:
                    self._lethal[share[0]] = error
                else:
                    left.append(_Suspects(share, deaths=group.deaths + 1, tested=True))
        return left

    def _test_alone(self, group: _Suspects) -> None:
        """Send each prompt alone for a few tokens, one at a time to each server.

        Those that a server dies on leave the group.
        """
        canary = self._batch.canary()
        untested = list(group.prompts)
        while untested:
            clients = self._servers(self.unanswered, len(untested))
            if len({client.url for client in clients}) < len(clients):  # a router: which server gets what is not known
                clients = clients[:1]
            shares = [(client, [index]) for client, index in zip(clients, untested, strict=False)]
            with self._load.count(shares, canary.sampling.n):
                result = self._send(shares, canary)
            never_ran = {share[0] for share, url, error in result.lost if self._is_innocent(url, error)}
            died_on = {share[0]: error for share, _, error in result.lost if share[0] not in never_ran}
            self._lethal.update(died_on)
            group.prompts = [index for index in group.prompts if index not in died_on]
            tested = {index for _, (index,) in shares} - never_ran
            untested = [index for index in untested if index not in tested]
        group.tested = True

    def _lethal_error(self) -> LethalPromptError:
        indices = sorted(self._lethal)
        last = self._lethal[indices[-1]]
        return LethalPromptError(
            f"servers died on prompt {_shorten(indices)}: of each, two requests ended with the death of their server, "
            f"the second with this prompt alone ({last}). It is sent to no further server; the other prompts are "
            "answered. The log of a dead server has the reason",
            server=getattr(last, "server", None),
            prompts={index: str(self._lethal[index]) for index in indices},
            replies=self._replies,
        )


def _shorten(indices: Sequence[int], most: int = 20) -> str:
    shown = ", ".join(map(str, indices[:most]))
    return f"numbers {shown}{f' and {len(indices) - most} more' if len(indices) > most else ''}"
