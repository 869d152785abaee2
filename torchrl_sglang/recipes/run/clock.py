"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["StepClock"]


class StepClock:
    """Adds up the seconds of named phases within a step.

    Args:
        always: phases that every lap has, with 0 seconds when they did not come.
        now: a clock in seconds that never goes back.

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
        """Time a block as part of ``phase``, which may come several times in a step."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - start

    def seconds(self, phase: str) -> float:
        """What a phase has taken since the last lap."""
        return self._seconds[phase]

    def lap(self) -> dict[str, float]:
        """Seconds of every phase since the last lap under ``<phase>_s``, and of the whole under ``step_s``."""
        now = self._now()
        seconds = {f"{phase}_s": value for phase, value in self._seconds.items()} | {"step_s": now - self._start}
        self._seconds, self._start = dict.fromkeys(self._always, 0.0), now
        return seconds
