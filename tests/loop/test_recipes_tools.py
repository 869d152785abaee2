"""``grpo_tools.py`` against the shared server, with a tiny random model whose answers often match as programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.loop.rollout_cases import reference_log_probs
from tests.loop.sync_cases import load
from tests.loop.test_recipes import rows_of, run_here, samples_of, served_version, settings
from torchrl_sglang import recipes
from torchrl_sglang.server import SGLangServer

pytestmark = pytest.mark.usefixtures("needs_sglang")

WITH_A_VOWEL = "(.*[aeiou].*)"  # any answer with a vowel counts as a program, so most conversations have several turns


def test_conversations_with_a_tool_are_trained_on_where_the_model_wrote_them(
    pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path
) -> None:
    words = settings(tiny_llama, pristine_server.url, tmp_path, steps=2)
    words += [f"tool.program='{WITH_A_VOWEL}'", "tool.max_turns=3", "tool.unsafe=true"]
    assert run_here("grpo_tools", [*words, "evaluate.every=2", "evaluate.questions=2", "evaluate.answers=4"])

    rows, samples = rows_of(tmp_path), samples_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["weight_version"] for row in rows] == [2, 3]
    assert served_version(pristine_server.url) == 3
    assert rows[0]["logprob_gap_max"] < 1e-3, "a tool's tokens are among those that count, or the model's are not"
    assert rows[0]["ess"] == pytest.approx(1, abs=1e-3)
    assert all(1 <= row["turns_mean"] <= 3 for row in rows)
    assert any(1 < row["turns_mean"] < 3 for row in rows), "every conversation had as many turns"
    first = [sample for sample in samples if sample["step"] == 1]
    model = load(tiny_llama)
    for sample in first:
        written = torch.tensor(sample["weight_versions"]) >= 0
        assert written[0]
        ids = torch.tensor(sample["prompt_ids"] + sample["response_ids"])
        expected = reference_log_probs(model, ids)[len(sample["prompt_ids"]) :]
        recorded = torch.tensor(sample["log_probs"])
        torch.testing.assert_close(recorded[written], expected[written], atol=1e-4, rtol=0)
        assert not recorded[~written].any()
        assert (not written.all()) == ("<|im_start|>tool" in sample["response"])
    assert not all(all(v >= 0 for v in sample["weight_versions"]) for sample in first)
    groups = [sample["position"] for sample in first]
    assert all(groups.count(position) == 4 for position in set(groups)), json.dumps(groups)
    evaluated = recipes.read_metrics(tmp_path / "evaluations.csv")
    assert [row["step"] for row in evaluated] == [0, 2]
    assert all(0 < row["eval_program_rate"] <= 1 for row in evaluated)
