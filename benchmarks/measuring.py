"""Times several things in turn, so that other programs on the machine slow all of them alike, and records ratios.

The scripts of this folder share it. A script prints a line per row; with ``--rows FILE`` it also appends each row to
that file, as one line of JSON, as soon as it is measured: ``benchmarks/bench.py`` collects them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from torchrl_sglang import SGLangError

__all__ = [
    "MALLOC",
    "Recorder",
    "Timing",
    "add_common_arguments",
    "ensure_malloc_settings",
    "interleaved",
    "quartiles",
]

# glibc returns large blocks to the kernel and allocates them again, and every page is faulted in again. Without
# these settings the same runs take up to twice as long and vary more. SGLangServer sets them for its CPU servers.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
# A round during which other programs used a larger share of the CPU is repeated, up to a number of times.
MAX_OTHER_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Timing:
    """One run: seconds by the clock, seconds of CPU time of this process, and what the run returned."""

    elapsed_s: float
    cpu_s: float
    result: Any


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    *,
    pairs: int,
    warm_ups: int,
    max_repeats: int,
    before_each: Callable[[], object] = lambda: None,
) -> tuple[dict[str, list[Timing]], int]:
    """Run all in turn, ``pairs`` times; each is first in its share of the rounds.

    Returns:
        Per name the timings, of which those with the same index belong together; and the number of repeated rounds.
    """
    names, others = list(runs), OtherPrograms()
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    repeats, number = 0, -warm_ups
    while number < pairs:
        first = number % len(names)
        others.share()
        measured = {}
        for name in names[first:] + names[:first]:
            before_each()
            measured[name] = _timed(runs[name])
        if number >= 0 and others.share() > MAX_OTHER_SHARE and repeats < max_repeats:
            repeats += 1
            time.sleep(1)
            continue
        if number >= 0:
            for name, timing in measured.items():
                timings[name].append(timing)
        number += 1
    return timings, repeats


def _timed(run: Callable[[], Any]) -> Timing:
    start, cpu = time.perf_counter(), time.process_time()
    result = run()
    return Timing(time.perf_counter() - start, time.process_time() - cpu, result)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of a single value three times that value.

    Examples:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0]), quartiles([2.0])
        ((2.0, 3.0, 4.0), (2.0, 2.0, 2.0))
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


class OtherPrograms:
    """The share of the CPU that other programs use; a round measured beside them is not reliable."""

    def __init__(self) -> None:
        self._mark = self._now()

    def share(self) -> float:
        """Fraction of all cores used by other programs since the last call."""
        before, self._mark = self._mark, self._now()
        busy, total, ours = (end - start for end, start in zip(self._mark, before, strict=True))
        return max(0.0, busy - ours) / total if total else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        per_second = os.sysconf("SC_CLK_TCK")
        me = psutil.Process()
        ours = 0.0
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                ours += times.user + times.system + times.children_user + times.children_system
        return (sum(ticks) - ticks[3] - ticks[4]) / per_second, sum(ticks) / per_second, ours


@dataclass(slots=True)
class Recorder:
    """Prints rows and appends them to a file.

    Attributes:
        section: what the rows belong to: ``"sync"``, ``"policy"``...
        path: the file; ``None`` writes none.
        repeats_left: rounds that may still be repeated because other programs were busy.
    """

    section: str
    path: Path | None = None
    repeats_left: int = 60
    rows: list[dict[str, Any]] = field(default_factory=list)

    def measure(
        self,
        name: str,
        runs: Mapping[str, Callable[[], Any]],
        *,
        pairs: int,
        warm_ups: int = 1,
        before_each: Callable[[], object] = lambda: None,
        settings: Mapping[str, Any] | None = None,
        details: Callable[[list[Timing], list[Timing]], Mapping[str, Any]] = lambda base, other: {},
    ) -> list[dict[str, Any]]:
        """Measure each of ``runs`` beside the first, which is the base of the ratios.

        Args:
            name: what is measured; with several compared with the base, their names are added.
            runs: the base, then what is compared with it.
            pairs: rounds.
            warm_ups: rounds before them, which don't count.
            before_each: called before each run, outside of its time.
            settings: recorded with the rows.
            details: from the base's and a run's timings, recorded with the row.

        Returns:
            A row per compared run. If it failed, the row has ``error`` and no figures; the script goes on.
        """
        base, *others = runs
        try:
            timings, repeats = interleaved(
                runs, pairs=pairs, warm_ups=warm_ups, max_repeats=self.repeats_left, before_each=before_each
            )
        except (SGLangError, RuntimeError, OSError, ValueError, AssertionError) as error:
            return [self.failed(name if len(others) == 1 else f"{name}, {other}", error) for other in others]
        self.repeats_left -= repeats
        rows = []
        for other in others:
            ratios = [b.elapsed_s / a.elapsed_s for a, b in zip(timings[base], timings[other], strict=True)]
            low, median, high = quartiles(ratios)
            rows.append(
                {
                    "name": name if len(others) == 1 else f"{name}, {other}",
                    "ratio": round(median, 4),
                    "low": round(low, 4),
                    "high": round(high, 4),
                    "ratios": [round(ratio, 4) for ratio in ratios],
                    "base_s": round(statistics.median(timing.elapsed_s for timing in timings[base]), 5),
                    "seconds": round(statistics.median(timing.elapsed_s for timing in timings[other]), 5),
                    "repeats": repeats,
                    "load": round(os.getloadavg()[0], 2),
                    "settings": dict(settings or {}),
                    **_rounded(details(timings[base], timings[other])),
                }
            )
        return [self.add(row) for row in rows]

    def failed(self, name: str, error: BaseException) -> dict[str, Any]:
        """Record that something could not be measured."""
        return self.add({"name": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Print a row and append it to the file."""
        row = {"section": self.section, **row}
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if "error" in row:
            print(f"{row['name']:46} not measured: {row['error']}", flush=True)
        elif "ratio" in row:
            more = "  ".join(f"{name} {value}" for name, value in row.items() if name in ("paused", "cpu_percent"))
            print(
                f"{row['name']:46} {row['ratio']:6.3f}  {row['low']:6.3f} ..{row['high']:6.3f}  of {row['base_s']:.3f} "
                f"s  repeats {row['repeats']:2}  load {row['load']:.1f}  {more}",
                flush=True,
            )
        else:
            print(f"{row['name']:46} {row['value']}", flush=True)
        return row


def _rounded(details: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: round(value, 3) if isinstance(value, float) else _rounded(value) if isinstance(value, Mapping) else value
        for name, value in details.items()
    }


def add_common_arguments(parser: argparse.ArgumentParser, *, pairs: int) -> None:
    """The arguments that every script has."""
    parser.add_argument("--pairs", type=int, default=pairs, help=f"rounds per row (default: {pairs})")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="append each row to this file, as a line of JSON")
    parser.add_argument(
        "--max-repeats", type=int, default=60, help="rounds to repeat because other programs were busy (default: 60)"
    )


def ensure_malloc_settings() -> None:
    """Start this program again with :data:`MALLOC` in its environment, which is read when a process starts."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
