"""The line that a recipe prints for a step fits into 120 columns; all other numbers are in metrics.csv."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import ClassVar

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = ("grpo", "grpo_agent", "grpo_async", "grpo_lora", "grpo_tools", "ppo")


class LargeNumbers(dict[str, float]):
    """A value for every column, as large as it usually gets."""

    WIDE: ClassVar = {
        **dict.fromkeys(("step", "weight_version"), 100),
        **dict.fromkeys(("generate_s", "train_s", "wait_s"), 99.9),
        "sync_s": 9.99,
    }

    def __missing__(self, column: str) -> float:
        return self.WIDE.get(column, 1.0)


def step_line(recipe: str) -> str:
    for node in ast.parse((EXAMPLES / f"{recipe}.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STEP_LINE":
            return str(ast.literal_eval(node.value))
    raise AssertionError(f"{recipe}.py has no STEP_LINE")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_steps_line_fits_and_begins_with_what_is_learnt(recipe: str) -> None:
    line = step_line(recipe).format_map(LargeNumbers())
    assert line.startswith("step 100 | reward 1.000, right 100%")
    assert "v100" in line
    assert len(line) <= 120, line
