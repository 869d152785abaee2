"""In half precision, rounding may choose another expert for a token: one token that differs says nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from torchrl_sglang import SyncConfig
from torchrl_sglang.parallel import Task
from torchrl_sglang.weights.update.verification import Probe, _compare_scores

ONE = [-1.0, -2.0, -5.8]
"""One of three tokens differs, as on a real server with a Qwen3-MoE in bfloat16."""
ALL = [-3.0, -4.0, -5.8]
EXPECTED = torch.tensor([-1.1, -2.1, -3.0], dtype=torch.float64)


def complaints(scores: list[float], *, dtype: torch.dtype, has_experts: bool) -> tuple[dict[str, str], float]:
    model = nn.Linear(2, 2).to(dtype)
    source: Any = SimpleNamespace(module=model)
    client: Any = SimpleNamespace(info=SimpleNamespace(device="cpu", tp_size=1))
    probe = Probe([client], 320, source, has_experts=has_experts)
    scoring = {"http://a": Task(lambda: scores, name="scores")}
    found, gaps = _compare_scores(cast(Any, scoring), probe, EXPECTED, SyncConfig(), dtype)
    return found, gaps["http://a"]


@pytest.mark.parametrize(
    ("scores", "dtype", "has_experts", "is_refused"),
    [
        (ONE, torch.bfloat16, True, False),
        (ALL, torch.bfloat16, True, True),
        (ONE, torch.bfloat16, False, True),
        (ONE, torch.float32, True, True),
        ([float("nan")] * 3, torch.bfloat16, True, True),
        (ONE[:2], torch.bfloat16, True, True),
    ],
)
def test_one_token_of_a_mixture_may_differ(
    scores: list[float], dtype: torch.dtype, has_experts: bool, is_refused: bool
) -> None:
    found, _ = complaints(scores, dtype=dtype, has_experts=has_experts)
    assert bool(found) is is_refused


def test_the_report_has_the_largest_difference() -> None:
    assert complaints(ONE, dtype=torch.bfloat16, has_experts=True)[1] == pytest.approx(2.8)
