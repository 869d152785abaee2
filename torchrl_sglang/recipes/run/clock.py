"""Measure the seconds of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["StepClock"]


class StepClock:
    """Adds up the seconds of named phases within a step.

    Args:
        always: phases that every lap contains, with 0 seconds if they did not occur.
        now: a monotonic clock in seconds.

    Examples:
        >>> ticks = iter([0.0, 0.0, 2.0, 2.0, 3.0, 7.0])
        >>> clock = StepClock(now=lambda: next(ticks))
        >>> with clock("generate"):
        ...     pass
        >>> with clock("train"):
        ...     pass
        >>> clock.lap()
        {'generate_s': 2.0, 'train_s': 1.0, 'step_s': 7.0}
    """

    def __init__(self, *always: str, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._always = always
        self._seconds: dict[str, float] = dict.fromkeys(always, 0.0)
        self._start = now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add a block's time to ``phase``; a phase may occur several times in a step."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - start

    def seconds(self, phase: str) -> float:
        """Seconds of a phase since the last lap."""
        return self._seconds[phase]

    def lap(self) -> dict[str, float]:
        """Return the seconds since the last lap: ``<phase>_s`` for each phase, ``step_s`` in total; start a new lap."""
        now = self._now()
        seconds = {f"{phase}_s": value for phase, value in self._seconds.items()} | {"step_s": now - self._start}
        self._seconds, self._start = dict.fromkeys(self._always, 0.0), now
        return seconds
