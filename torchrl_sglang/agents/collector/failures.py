"""What became of runs that can't be trained on, and of groups that were replaced."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from torchrl_sglang.errors import SGLangError

__all__ = ["FailureKind", "RunFailedError", "RunFailure", "SkipReason"]

FailureKind = Literal["error", "timeout", "no reward", "bad reward", "no requests", "expired", "gateway"]
"""Why a run failed: the agent raised or exited with an error; it took too long; it gave no reward; its reward is no
finite number or contradicts another; it sampled nothing through the gateway; its session expired; the gateway did not
have its session any more, or took no reward for it.
"""

SkipReason = Literal["failed", "equal", "stale"]
"""Why a group was replaced: a run failed; all rewards are equal; its oldest token is too old."""


class RunFailedError(SGLangError):
    """A run of an agent gives nothing to train on. The collector catches it, and counts it.

    Attributes:
        kind: why.
    """

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[RunFailedError], tuple[FailureKind, str]]:
        return type(self), (self.kind, str(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailure:
    """A run that gave nothing to train on.

    Attributes:
        kind: why.
        message: what happened, with the end of the agent's error output.
        group_id: number of the group's task.
        member: number of the run in its group.
        session: id of its session; empty if there was none.
    """

    kind: FailureKind
    message: str
    group_id: int
    member: int
    session: str = ""

    def __str__(self) -> str:
        return f"run {self.member} of task {self.group_id}: {self.kind}: {self.message}"


class Counts:
    """Numbers of groups and runs since the beginning.

    Attributes:
        groups: groups that were good.
        runs: runs that ended, failed ones included.
        skipped: groups that were replaced, by reason.
        failed_runs: runs that failed, by kind.
    """

    def __init__(self) -> None:
        self.groups = self.runs = 0
        self.skipped: Counter[SkipReason] = Counter()
        self.failed_runs: Counter[FailureKind] = Counter()
