"""Turns that several requests may wait for: a request and its retries."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrl_sglang.agents.conversation.tree import Node
from torchrl_sglang.agents.types import Choice, OnProgress, Progress, Turn
from torchrl_sglang.errors import ConfigError

__all__ = ["PendingTurn", "TurnRecord", "TurnRecords"]

_KEPT_FAILURES = 256
"""Failed requests that are remembered; a retry comes within seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """A finished turn.

    Attributes:
        id: names it.
        nodes: its answers, one per choice.
        prompt_tokens: number of tokens of the prompt.
        cached_tokens: as in :class:`Turn`.
        server: URL of the server that generated its first choice.
    """

    id: str
    nodes: Sequence[Node]
    prompt_tokens: int
    cached_tokens: int
    server: str

    @property
    def is_continued(self) -> bool:
        """Whether a conversation has gone on from one of its answers."""
        return any(node.children for node in self.nodes)

    def as_turn(self, *, is_repeated: bool = False, receipt: object = None) -> Turn:
        """The turn as the client gets it."""
        return Turn(
            id=self.id,
            choices=tuple(_choice(index, node) for index, node in enumerate(self.nodes)),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(len(node.output_ids) for node in self.nodes),
            cached_tokens=self.cached_tokens,
            is_repeated=is_repeated,
            receipt=receipt,
            read_prompt_ids=self.nodes[0].all_prompt_ids,
        )


def _choice(index: int, node: Node) -> Choice:
    return Choice(
        index=index,
        message=node.answer.as_openai(),
        text=node.text,
        token_ids=tuple(node.output_ids),
        log_probs=tuple(node.log_probs),
        weight_versions=tuple(node.versions),
        finish_reason=node.finish_reason,
        top_log_probs=node.top_log_probs,
        stop=node.stop,
    )


class PendingTurn:
    """A turn under way. It goes on as long as somebody waits for it.

    Args:
        sample: generates and records it; called with the function to report progress to.
        streams: whether somebody wants reports of its progress.

    Attributes:
        is_withdrawn: the session has ended it.
        is_ending: it is being aborted, or is over.
    """

    def __init__(
        self, sample: Callable[[OnProgress | None], Coroutine[Any, Any, TurnRecord]], *, streams: bool
    ) -> None:
        self.is_withdrawn = False
        self.is_ending = False
        self._listeners: list[OnProgress] = []
        self._reports: dict[int, list[Progress]] = {}
        self._waiting = 0
        self._is_taken = False
        self.task = asyncio.get_running_loop().create_task(sample(self._report if streams else None))

    def _report(self, progress: Progress) -> None:
        _keep(self._reports.setdefault(progress.index, []), progress)
        for listener in self._listeners:
            listener(progress)

    async def result(self, on_progress: OnProgress | None) -> TurnRecord:
        """Wait for it. If everybody who waits is cancelled, so is the turn."""
        if on_progress is not None:
            self._listeners.append(on_progress)
            for reports in self._reports.values():
                on_progress(Progress.joined(reports))
        self._waiting += 1
        try:
            record = await asyncio.shield(self.task)
            self._is_taken = True
            return record
        finally:
            self._waiting -= 1
            if on_progress is not None:
                self._listeners.remove(on_progress)
            if not self._waiting:
                self._end()

    @property
    def record(self) -> TurnRecord | None:
        """The turn, if it is finished and recorded."""
        is_finished = self.task.done() and not self.task.cancelled() and self.task.exception() is None
        return self.task.result() if is_finished else None

    @property
    def untaken(self) -> TurnRecord | None:
        """The turn, if it is recorded, nobody has taken it, and nobody waits for it any more."""
        return None if self._is_taken or self._waiting else self.record

    def withdraw(self) -> None:
        """End it: the session takes no more answers."""
        self.is_withdrawn = True
        self._end()

    def _end(self) -> None:
        self.is_ending = True
        self.task.cancel()  # does nothing if it is done


def _keep(reports: list[Progress], new: Progress) -> None:
    """Add a report. Those of like length are joined, so few are kept, and none is copied often."""
    reports.append(new)
    while len(reports) > 1 and len(reports[-2].token_ids) <= len(reports[-1].token_ids):
        reports[-2:] = [Progress.joined(reports[-2:])]


@dataclass(slots=True, eq=False)
class _Entry:
    signature: bytes
    key: str | None
    turn: PendingTurn | TurnRecord
    attempt: int = 0
    """The latest attempt that was given this turn."""
    is_undelivered: bool = False
    is_retried: bool = False
    """A retry has come while the turn was being aborted."""
    receipts: list[object] = field(default_factory=list)
    """The latest deliveries: of those who waited for the turn together, or of the last repetition."""


class TurnRecords:
    """The turns of one session, by what was requested."""

    def __init__(self) -> None:
        self._entries: dict[_Entry, None] = {}
        self._by_signature: dict[bytes, list[_Entry]] = {}
        self._by_key: dict[str, list[_Entry]] = {}
        self._num_pending = 0
        self._failed: deque[tuple[bytes, int]] = deque(maxlen=_KEPT_FAILURES)

    @property
    def num_turns(self) -> int:
        """Number of finished turns."""
        return len(self._entries) - self._num_pending

    @property
    def num_pending(self) -> int:
        """Number of turns under way."""
        return self._num_pending

    def find(self, signature: bytes, key: str | None, *, attempt: int) -> PendingTurn | TurnRecord | None:
        """The turn that a request repeats; ``None`` if it has to be generated.

        Args:
            signature: equal for requests that ask for the same.
            key: its idempotency key.
            attempt: how often the client says that it has sent the request before.

        Raises:
            ConfigError: the key belongs to another request.
        """
        if key is not None:
            same_key = next(filter(_is_alive, self._by_key.get(key, ())), None)
            if same_key is None:
                return None
            if same_key.signature != signature:
                raise ConfigError(
                    f"the idempotency key {key!r:.100} was sent with another request before: use a new key for each"
                )
            return same_key.turn
        equal = list(filter(_is_alive, reversed(self._by_signature.get(signature, ()))))
        found = next((entry for entry in equal if entry.is_undelivered), None)
        if found is None and attempt and not self._take_failed(signature, attempt):
            found = next((entry for entry in equal if entry.attempt < attempt and _may_repeat(entry)), None)
        if found is None:
            return None
        found.is_undelivered = False
        found.attempt = max(found.attempt, attempt)
        return found.turn

    def _take_failed(self, signature: bytes, attempt: int) -> bool:
        """Whether the request repeats one that failed; that one is forgotten."""
        earlier = [failed for failed in self._failed if failed[0] == signature and failed[1] < attempt]
        if earlier:
            self._failed.remove(max(earlier, key=lambda failed: failed[1]))
            return True
        for entry in self._by_signature.get(signature, ()):
            is_ending = isinstance(entry.turn, PendingTurn) and entry.turn.is_ending
            if is_ending and not entry.is_retried and entry.attempt < attempt:
                entry.is_retried = True
                return True
        return False

    def begin(self, turn: PendingTurn, signature: bytes, key: str | None, *, attempt: int = 0) -> None:
        """A turn has begun. Of one that fails only this is kept: a retry is not a retry of another equal request."""
        entry = _Entry(signature, key, turn, attempt)
        self._entries[entry] = None
        self._num_pending += 1
        self._by_signature.setdefault(signature, []).append(entry)
        if key is not None:
            self._by_key.setdefault(key, []).append(entry)

        def ended(task: asyncio.Task[TurnRecord]) -> None:
            self._num_pending -= 1
            if task.cancelled() or task.exception() is not None:
                del self._entries[entry]
                _forget(self._by_signature, signature, entry)
                if key is not None:
                    _forget(self._by_key, key, entry)
                if not entry.is_retried:
                    self._failed.append((entry.signature, entry.attempt))
            else:
                entry.turn = task.result()

        turn.task.add_done_callback(ended)

    def delivered(self, record: TurnRecord, *, is_repeated: bool, joins: bool = False) -> Turn:
        """A finished turn, for a client that gets it.

        Args:
            record: the turn.
            is_repeated: the client's request was recognised as a retry.
            joins: the client has waited for it, perhaps beside others.
        """
        receipt = object()
        entry = self._entry(record.id)
        if entry is not None:
            entry.receipts = [*entry.receipts, receipt] if joins else [receipt]
        return record.as_turn(is_repeated=is_repeated, receipt=receipt)

    def undelivered(self, turn: Turn) -> None:
        """A finished turn did not reach a client. One that another client got with it, or since, is no lost one."""
        entry = self._entry(turn.id)
        if entry is not None and turn.receipt in entry.receipts:
            entry.receipts.remove(turn.receipt)
            if not entry.receipts:
                self._lose(entry)

    def lost(self, record: TurnRecord) -> None:
        """A finished turn that nobody has taken."""
        entry = self._entry(record.id)
        if entry is not None:
            self._lose(entry)

    def _entry(self, turn_id: str) -> _Entry | None:
        for entry in reversed(self._entries):
            # A task that has ended tells so one step of the event loop later.
            record = entry.turn.record if isinstance(entry.turn, PendingTurn) else entry.turn
            if record is not None and record.id == turn_id:
                return entry
        return None

    @staticmethod
    def _lose(entry: _Entry) -> None:
        record = entry.turn.record if isinstance(entry.turn, PendingTurn) else entry.turn
        entry.is_undelivered = record is not None and not record.is_continued

    def withdraw_all(self) -> None:
        """End all turns under way."""
        for entry in list(self._entries):
            if isinstance(entry.turn, PendingTurn):
                entry.turn.withdraw()


def _forget(entries: dict[Any, list[_Entry]], name: Any, entry: _Entry) -> None:
    entries[name].remove(entry)
    if not entries[name]:
        del entries[name]


def _is_alive(entry: _Entry) -> bool:
    return isinstance(entry.turn, TurnRecord) or not entry.turn.is_ending


def _may_repeat(entry: _Entry) -> bool:
    return isinstance(entry.turn, PendingTurn) or not entry.turn.is_continued
