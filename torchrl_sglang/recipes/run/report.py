"""Draw ``report.png``: a run in four panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw_report", "unfinished_report"]

_COLORS = {"generate": "#4393c3", "wait": "#92c5de", "score": "#d1e5f0", "train": "#f4a582", "sync": "#5aae61"}
_COLORS |= {"evaluate": "#b2abd2", "save": "#cccccc"}
_BLUE, _RED, _GRAY = "#2166ac", "#b2182b", "#777777"

Rows = Sequence[dict[str, Any]]


def draw_report(rows: Rows, evaluations: Rows, path: Path) -> None:
    """Draw reward, time per step, log-prob gap between server and trainer, and age of the tokens.

    A panel shows those of its columns that the rows have. No global state of matplotlib is used, so any thread may call
    this.

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
    _draw_reward(panels[0, 0], rows, evaluations)
    _draw_seconds(panels[0, 1], rows)
    _draw_agreement(panels[1, 0], rows)
    _draw_staleness(panels[1, 1], rows)
    unfinished = unfinished_report(path)
    figure.savefig(unfinished, dpi=110, format="png")
    unfinished.replace(path)


def unfinished_report(path: Path) -> Path:
    """The file that holds a report until it is complete."""
    return path.with_name(f".{path.name}")


def _draw_reward(axes: Axes, rows: Rows, evaluations: Rows) -> None:
    axes.set_title("Mean reward; held-out pass@1 where evaluated", loc="left")
    _line(axes, rows, "reward_mean", _BLUE, "reward")
    _line(axes, evaluations, "eval_pass_at_1", _RED, "held-out pass@1")
    _legend(axes)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _draw_seconds(axes: Axes, rows: Rows) -> None:
    axes.set_title("Where the trainer's time goes", loc="left")
    steps = [row["step"] for row in rows]
    bottom = [0.0] * len(rows)
    for name, color in _COLORS.items():
        heights = [float(row[f"{name}_s"]) if _is_number(row.get(f"{name}_s")) else 0.0 for row in rows]
        if max(heights) >= 0.01:
            label = f"{name} {sum(heights) / len(heights):.2f} s"
            axes.bar(steps, heights, bottom=bottom, color=color, width=0.8, label=label)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("seconds")
    axes.set_ylim(0, max([*bottom, 1e-3]) * 1.35)
    _legend(axes, loc="upper right", ncols=2, title="mean per step")


def _draw_agreement(axes: Axes, rows: Rows) -> None:
    axes.set_title("Log-prob gap, server to trainer (nats)", loc="left")
    _line(axes, rows, "logprob_gap_max", _BLUE, "largest")
    _line(axes, rows, "logprob_gap_mean", _GRAY, "mean")
    axes.set_yscale("log")
    _legend(axes)


def _draw_staleness(axes: Axes, rows: Rows) -> None:
    axes.set_title("Age of the tokens (weight versions) and effective sample size", loc="left")
    _line(axes, rows, "staleness_mean", _BLUE, "mean age")
    _line(axes, rows, "staleness_max", _GRAY, "largest age")
    _line(axes, rows, "ess", _RED, "effective sample size")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _line(axes: Axes, rows: Rows, column: str, color: str, label: str) -> None:
    points = [(row["step"], row[column]) for row in rows if _is_number(row.get(column))]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=label)


def _legend(axes: Axes, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **options)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
