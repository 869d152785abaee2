"""Shows a run: phases in words while it loads, then its steps."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from torchrl_sglang.progress import PhaseLine

__all__ = ["Display"]


class Display:
    """On a terminal a line of phases, then a progress bar; elsewhere one line per phase and per step.

    The bar counts the time from :meth:`start`, so that its time per step is without loading.

    Args:
        total: number of steps of the whole run.
        initial: number of steps that are finished already.

    Examples:
        >>> display = Display(total=2)
        >>> display.start()
        >>> display.line("step 1 | reward 0.5")
        step 1 | reward 0.5
        >>> display.close()
    """

    def __init__(self, total: int, initial: int = 0) -> None:
        self._total = total
        self._initial = initial
        self._phases = PhaseLine()
        self._bar: Any = None
        self._started = False

    def say(self, activity: str) -> None:
        """Show the current activity; within the steps on a terminal only."""
        if self._bar is not None:
            self._bar.set_postfix_str(activity)
        elif not self._started:
            self._phases(activity)

    def start(self) -> None:
        """The steps begin; further calls do nothing."""
        if self._started:
            return
        self._started = True
        self._phases.clear()
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._total, initial=self._initial, unit="step", dynamic_ncols=True)

    def line(self, text: str) -> None:
        """Print a line on standard output, above the bar."""
        self._phases.clear()
        if self._bar is not None:
            self._bar.write(text)
        else:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def step(self) -> None:
        """A step is finished."""
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """Leave the bar as it is, and remove the line of phases."""
        self._phases.clear()
        if self._bar is not None:
            self._bar.close()
