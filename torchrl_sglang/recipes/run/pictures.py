"""Draw what a run's folder shows to a person: ``report.png`` and ``samples.html``."""

from __future__ import annotations

from pathlib import Path

from torchrl_sglang.recipes.run.report import Rows, draw_report
from torchrl_sglang.recipes.run.samples_page import write_samples_page

__all__ = ["draw_pictures"]


def draw_pictures(rows: Rows, evaluations: Rows, path: Path) -> None:
    """Draw the report, and beside it the page of samples.

    Args:
        rows: one per step.
        evaluations: one per evaluation.
        path: the report's file; ``samples.jsonl`` is read from its folder.
    """
    draw_report(rows, evaluations, path)
    folder = path.parent
    write_samples_page(folder / "samples.jsonl", folder / "samples.html", title=f"Samples of {folder.name}")
