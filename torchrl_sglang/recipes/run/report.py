"""Draw ``report.png``: a run in four panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["Rows", "draw_report", "unfinished_report"]

_COLORS = {"generate": "#4393c3", "wait": "#92c5de", "score": "#d1e5f0", "train": "#f4a582", "sync": "#5aae61"}
_COLORS |= {"evaluate": "#b2abd2", "save": "#cccccc"}
_BLUE, _RED, _GREEN, _GRAY = "#2166ac", "#b2182b", "#1b7837", "#777777"

Rows = Sequence[dict[str, Any]]


def draw_report(rows: Rows, evaluations: Rows, path: Path) -> None:
    """Draw reward, time per step, log-prob gap between server and trainer, and rate of right answers.

    A panel shows those of its columns that the rows have. The last one also shows the age of the tokens if there are
    old ones, and the effective sample size if it falls below 0.99. No global state of matplotlib is used, so any thread
    may call this.

    Args:
        rows: one per step, as :class:`RunFolder` keeps them.
        evaluations: one per evaluation.
        path: a PNG file; replaced atomically.
    """
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e8e8e8")
        axes.set_axisbelow(True)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    _draw_reward(panels[0, 0], rows)
    _draw_seconds(panels[0, 1], rows)
    _draw_agreement(panels[1, 0], rows)
    _draw_right(panels[1, 1], rows, evaluations)
    unfinished = unfinished_report(path)
    figure.savefig(unfinished, dpi=110, format="png")
    unfinished.replace(path)


def unfinished_report(path: Path) -> Path:
    """The file that holds a report until it is complete."""
    return path.with_name(f".{path.name}")


def _draw_reward(axes: Axes, rows: Rows) -> None:
    axes.set_title("Reward, mean over the answers of the step", loc="left")
    _line(axes, rows, "reward_mean", _BLUE, "reward")
    axes.set_ylabel("reward")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _draw_seconds(axes: Axes, rows: Rows) -> None:
    axes.set_title("Seconds of the trainer per step, by phase", loc="left")
    steps = [row["step"] for row in rows]
    bottom = [0.0] * len(rows)
    for name, color in _COLORS.items():
        heights = [float(row[f"{name}_s"]) if _is_number(row.get(f"{name}_s")) else 0.0 for row in rows]
        if max(heights) >= 0.01:
            mean = sum(heights) / len(heights)
            label = f"{name} {mean:.{2 if mean < 1 else 1}f} s"
            axes.bar(steps, heights, bottom=bottom, color=color, width=0.8, label=label)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("seconds")
    axes.set_ylim(0, max([*bottom, 1e-3]) * 1.35)
    _legend(axes, loc="upper right", ncols=2, title="mean per step")


def _draw_agreement(axes: Axes, rows: Rows) -> None:
    axes.set_title("Log-prob gap of the sampled tokens, server to trainer", loc="left")
    _line(axes, rows, "logprob_gap_max", _BLUE, "largest")
    _line(axes, rows, "logprob_gap_mean", _GRAY, "mean")
    axes.set_yscale("log")
    axes.set_ylabel("nats")
    _legend(axes)


def _draw_right(axes: Axes, rows: Rows, evaluations: Rows) -> None:
    """Rates between 0 and 1 on the left; the age of the tokens on the right, if any is older than the weights."""
    _line(axes, rows, "right_rate", _BLUE, "right answers of the step")
    _line(axes, evaluations, "eval_pass_at_1", _RED, "pass@1, held-out questions")
    if any(value < 0.99 for value in _values(rows, "ess")):
        _line(axes, rows, "ess", _GREEN, "effective sample size", linewidth=1)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("rate")
    axes.set_title("Rate of right answers", loc="left")
    ages = _values(rows, "staleness_max")
    handles, labels = axes.get_legend_handles_labels()
    if any(ages):
        axes.set_title("Rate of right answers; age of their tokens (right axis)", loc="left")
        right = axes.twinx()
        right.spines["top"].set_visible(False)
        right.set_ylabel("age in weight versions")
        _line(right, rows, "staleness_mean", _GRAY, "mean age", linestyle="--", linewidth=1, markersize=0)
        _line(right, rows, "staleness_max", _GRAY, "largest age", linestyle=":", linewidth=1, markersize=0)
        right.set_ylim(0, max(ages) * 2.1)
        right.yaxis.set_major_locator(MaxNLocator(integer=True))
        more_handles, more_labels = right.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    if len(labels) > 1:
        axes.legend(handles, labels, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))


def _values(rows: Rows, column: str) -> list[float]:
    return [row[column] for row in rows if _is_number(row.get(column))]


def _line(axes: Axes, rows: Rows, column: str, color: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[column]) for row in rows if _is_number(row.get(column))]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, label=label, marker="o", **{"markersize": 3, **style})


def _legend(axes: Axes, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **options)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
