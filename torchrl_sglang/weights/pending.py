"""A sync that runs in the background."""

from __future__ import annotations

from torchrl_sglang.errors import ServerTimeoutError
from torchrl_sglang.parallel import Task
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["PendingSync"]


class PendingSync:
    """Handle of a push that is under way (see :meth:`WeightSync.push_in_background`).

    Attributes:
        asked: somebody has called :meth:`result`, so a failure does not go unseen.
    """

    def __init__(self, task: Task[SyncReport | None]) -> None:
        self.asked = False
        self._task = task

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._task.done

    def join(self) -> None:
        """Wait until it has ended, and look at nothing."""
        self._task.wait()

    def result(self, timeout_s: float | None = None) -> SyncReport | None:
        """Wait for the push.

        Args:
            timeout_s: seconds to wait; ``None`` waits as long as the push's own deadline lets it run.

        Returns:
            What it did.

        Raises:
            ServerTimeoutError: it is still under way.
            SGLangError: it failed; the error :meth:`WeightSync.push` would have raised.
        """
        if not self._task.wait(timeout_s):
            raise ServerTimeoutError(f"the weight sync is still under way after {timeout_s} s; ask again")
        self.asked = True
        return self._task.outcome().unwrap()
