"""SIGTERM ends a command as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

__all__ = ["Termination"]


class Termination:
    """A ``with`` block that SIGTERM ends with ``KeyboardInterrupt``.

    Python drops an exception that a signal raises while an object is being freed. A loop that waits calls
    :meth:`check`, so that it ends then, too. In other threads than the main one it does nothing.
    """

    def __init__(self) -> None:
        self._requested = False
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Termination:
        if self._is_main:
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_main:
            signal.signal(signal.SIGTERM, self._before)

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if SIGTERM has arrived."""
        if self._requested:
            raise KeyboardInterrupt

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._requested = True
        raise KeyboardInterrupt
