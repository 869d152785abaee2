"""Ctrl-C handling: the first one lets the current step finish, the second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest"]


class StopRequest:
    """A ``with`` block in which Ctrl-C and SIGTERM set a flag instead of raising an exception.

    The trainer checks :attr:`requested` between two steps, where model, optimizer and servers agree, and saves. A
    second Ctrl-C raises ``KeyboardInterrupt`` at once. Outside the main thread, where Python delivers no signals, the
    block does nothing.

    Args:
        on_request: called in the signal handler, to inform the user.

    Attributes:
        requested: whether to stop after this step.

    Examples:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGINT)
        ...     stop.requested
        True
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, on_request: Callable[[], object] | None = None) -> None:
        self.requested = False
        self._on_request = on_request
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._on_signal) for each in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for each, before in self._before.items():
            signal.signal(each, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._on_request is not None:
            self._on_request()
