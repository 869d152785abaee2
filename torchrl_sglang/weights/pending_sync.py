"""The handle of a push that runs in the background."""

from __future__ import annotations

from torchrl_sglang.errors import ServerTimeoutError
from torchrl_sglang.parallel import Task
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["PendingSync"]


class PendingSync:
    """Handle of a push that runs in the background (:meth:`WeightSync.push_in_background`).

    Attributes:
        retrieved: :meth:`result` was called and has returned or raised, so a failure was not missed.
    """

    def __init__(self, task: Task[SyncReport | None]) -> None:
        self.retrieved = False
        self._task = task

    @property
    def done(self) -> bool:
        """Whether it has ended, with success or not."""
        return self._task.done

    def join(self) -> None:
        """Wait until it has ended; a failure is not raised."""
        self._task.wait()

    def result(self, timeout_s: float | None = None) -> SyncReport | None:
        """Wait for the push.

        Args:
            timeout_s: seconds to wait; ``None`` waits as long as the push's own deadline lets it run.

        Returns:
            What it did.

        Raises:
            ServerTimeoutError: it is still running.
            ConfigError: this process was forked from the one that sends the weights, which has the result.
            SGLangError: it failed; the error that :meth:`WeightSync.push` would have raised.
        """
        if not self._task.wait(timeout_s) and not self._task.runs_elsewhere:
            raise ServerTimeoutError(f"the weight sync is still under way after {timeout_s} s: call result() again")
        self.retrieved = True
        return self._task.outcome().unwrap()
