"""Every recipe for a few steps against the shared server; runs that are killed and resumed.

Most tests run the recipe in this process, which has imported everything already; a recipe that is killed runs in its
own process. ``test_examples.py`` runs the quick start from the command line and interrupts it.
"""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fake_sglang import FakeServer, FakeSettings
from tests.loop.rollout_cases import largest_gap
from tests.loop.sync_cases import load
from torchrl_sglang import recipes
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.protocol.dialect import MODEL_INFO
from torchrl_sglang.protocol.version import version_number
from torchrl_sglang.server import SGLangServer

EXAMPLES = Path(__file__).parents[2] / "examples"
DEADLINE_S = 200.0
QUESTIONS, ANSWERS = 2, 4
BATCH = QUESTIONS * ANSWERS

pytestmark = [pytest.mark.usefixtures("needs_sglang"), pytest.mark.timeout(2 * DEADLINE_S)]


@pytest.fixture(autouse=True)
def rewards_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is never right; with equal rewards the advantages, and so every update, would be 0."""
    monkeypatch.setattr("torchrl_sglang.recipes.data.tasks.score_sum", lambda answer, *_: (len(answer) / 20, False))


def settings(model: Path, url: str, folder: Path, *, steps: int) -> list[str]:
    # A high learning rate: a tiny random model must change visibly within a step.
    return [
        *(f"model={model}", f"engine.url={url}", f"run.folder={folder}", f"train.steps={steps}"),
        *(f"train.questions={QUESTIONS}", f"train.answers={ANSWERS}", "train.micro_batch=3", "train.lr=1e-2"),
        "policy.generate_kwargs.max_new_tokens=6",
    ]


def run_here(name: str, words: list[str]) -> bool:
    """Run the recipe's own ``train`` in this process."""
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    arguments = recipes.parse_arguments(path, words)
    ended: bool = recipe.train(recipes.load_config(path, arguments), arguments.resume is not None)
    return ended


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return recipes.read_metrics(folder / "metrics.csv")


def samples_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def served_version(url: str) -> int:
    client = SGLangClient(url)
    try:
        return version_number(str(client.send(MODEL_INFO)["weight_version"]))
    finally:
        client.close()


def check_run(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Check that every step and every question's group occur once and in order, and that the files exist."""
    rows, samples = rows_of(folder), samples_of(folder)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [sample["step"] for sample in samples] == [step for step in range(1, steps + 1) for _ in range(BATCH)]
    assert [sample["position"] for sample in samples] == [n for n in range(QUESTIONS * steps) for _ in range(ANSWERS)]
    for row in rows:
        assert 0 < row["ess"] <= 1
        assert row["train_s"] > 0
        assert row["sync_s"] > 0
        assert row["peak_cpu_gb"] > 0.1
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "config.yaml").exists()
    return rows


def test_grpo_async_trains_on_tokens_one_update_old_and_weights_them(
    pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path
) -> None:
    words = settings(tiny_llama, pristine_server.url, tmp_path, steps=3)
    assert run_here("grpo_async", [*words, "evaluate.every=2", "evaluate.questions=2", "evaluate.answers=4"])
    rows = check_run(tmp_path, 3)
    # the servers ran before, so they are sent the first weights too
    assert [row["weight_version"] for row in rows] == [2, 3, 4]
    assert served_version(pristine_server.url) == 4
    first, *later = rows
    assert first["staleness_max"] == 0
    assert first["logprob_gap_max"] < 1e-3
    assert first["ratio_max"] == pytest.approx(1, abs=1e-3)
    for row in later:
        assert row["staleness_max"] <= 1
        assert row["logprob_gap_max"] < 1e-3 or row["staleness_mean"] > 0
    assert any(row["staleness_mean"] > 0 for row in later), "generation waited for training"
    evaluated = recipes.read_metrics(tmp_path / "evaluations.csv")
    assert [row["step"] for row in evaluated] == [0, 2, 3]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters() > 0


def test_answers_in_progress_during_an_update_continue_and_each_token_has_its_version(
    pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path
) -> None:
    words = settings(tiny_llama, pristine_server.url, tmp_path, steps=4)
    words[-1] = "policy.generate_kwargs.max_new_tokens=200"
    # far ahead, so that generation never stops; answers long enough to span an update
    far_ahead = ["rollouts.ahead=8", "rollouts.max_staleness=8", "train.micro_batch=8"]
    assert run_here("grpo_async", [*words, *far_ahead, "+policy.generate_kwargs.ignore_eos=true"])
    rows, samples = check_run(tmp_path, 4), samples_of(tmp_path)
    mixed = [sample["weight_versions"] for sample in samples if len(set(sample["weight_versions"])) > 1]
    # their number depends on timing; test_weight_sync_in_flight.py makes sure that some exist
    assert all(versions == sorted(versions) and len(versions) == 200 for versions in mixed)
    for row in rows:
        ages = dict(pair.split(":") for pair in row["staleness_histogram"].split())
        assert sum(map(int, ages.values())) == 200 * BATCH


def test_grpo_async_without_batches_ahead_is_on_policy(
    pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path
) -> None:
    words = settings(tiny_llama, pristine_server.url, tmp_path, steps=2)
    assert run_here("grpo_async", [*words, "rollouts.ahead=0"])
    for row in check_run(tmp_path, 2):
        assert row["staleness_max"] == 0
        assert row["logprob_gap_max"] < 1e-3
        assert row["ess"] == pytest.approx(1, abs=1e-3)


def test_answers_that_are_too_old_are_dropped(pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path) -> None:
    words = settings(tiny_llama, pristine_server.url, tmp_path, steps=3)
    assert run_here("grpo_async", [*words, "rollouts.max_staleness=0"])
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["staleness_max"] == 0 for row in rows)
    assert sum(row["dropped_answers"] for row in rows) > 0
    positions = [sample["position"] for sample in samples_of(tmp_path)]
    assert positions == sorted(positions)


def test_ppo_with_a_reference_in_its_own_process(
    pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path
) -> None:
    words = settings(tiny_llama, pristine_server.url, tmp_path, steps=2)
    assert run_here("ppo", [*words, "reference.kind=copy"])
    rows = check_run(tmp_path, 2)
    assert all(row["logprob_gap_max"] < 1e-3 for row in rows)
    assert rows[0]["kl_reference_k3"] < 1e-9, "before the first step the policy is the reference"
    assert rows[1]["kl_reference_k3"] > 1e-4
    assert rows[0]["value_mean"] == 0
    assert rows[1]["value_mean"] != 0
    assert rows[0]["update_clip_fraction"] > 0, "the second epoch sees a policy that has moved"


def test_ppo_scores_the_reference_on_a_second_server(
    pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path
) -> None:
    words = settings(tiny_llama, pristine_server.url, tmp_path, steps=1)
    with FakeServer(FakeSettings(model_path=tiny_llama)) as reference:
        assert run_here("ppo", [*words, f"reference_engine.url={reference.url}", "critic.kind=separate"])
    (row,) = check_run(tmp_path, 1)
    assert row["kl_reference_k3"] > 0.1, "the fake's log-probs are not the model's"
    assert served_version(pristine_server.url) == 2


@pytest.mark.slow
def test_ppos_reference_on_a_real_server_is_the_untrained_model(
    pristine_server: SGLangServer, launch_server: Callable[..., SGLangServer], tiny_llama: Path, tmp_path: Path
) -> None:
    reference = launch_server()
    words = settings(tiny_llama, pristine_server.url, tmp_path, steps=3)
    assert run_here("ppo", [*words, f"reference_engine.url={reference.url}"])
    rows = check_run(tmp_path, 3)
    assert rows[0]["kl_reference_k3"] < 1e-6
    assert rows[2]["kl_reference_k3"] > 1e-4
    assert served_version(reference.url) == 0


def test_grpo_lora_sends_the_adapter_alone(tiny_llama: Path, tmp_path: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama, enable_lora=True)) as server:
        words = settings(tiny_llama, server.url, tmp_path, steps=2)
        assert run_here("grpo_lora", [*words, "+weight_sync_schemes.policy.config.verify=off", "checkpoint.every=1"])
    rows = check_run(tmp_path, 2)
    whole_mb = sum(p.numel() * 4 for p in AutoModelForCausalLM.from_pretrained(tiny_llama).parameters()) / 1e6
    assert 0 < rows[0]["sync_mb"] < whole_mb
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    kept = recipes.Checkpoints(tmp_path / "checkpoints").latest()
    assert kept is not None
    assert all("lora_" in name for name in kept.modules["model"])


@pytest.mark.slow
def test_grpo_lora_on_a_real_server_stays_in_agreement_and_resumes(
    launch_server: Callable[..., SGLangServer], tiny_llama: Path, tmp_path: Path
) -> None:
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    server = launch_server(
        extra_args=(
            *("--enable-lora", "--max-lora-rank", "16", "--lora-target-modules", *targets),
            *("--lora-backend", "torch_native", "--max-loras-per-batch", "4"),
        )
    )
    words = settings(tiny_llama, server.url, tmp_path, steps=3)
    assert run_here("grpo_lora", words)
    assert run_here("grpo_lora", ["--resume", str(tmp_path), "train.steps=5"])
    rows = check_run(tmp_path, 5)
    assert all(row["logprob_gap_max"] < 1e-3 for row in rows)
    moved = torch.tensor([row["reward_mean"] for row in rows])
    assert moved.isfinite().all()


def start(name: str, log: Path, words: list[str]) -> subprocess.Popen[bytes]:
    with log.open("a") as output:
        command = [sys.executable, str(EXAMPLES / f"{name}.py"), *words]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.02)


def steps_written(folder: Path) -> int:
    metrics = folder / "metrics.csv"
    return metrics.read_text().count("\n") - 1 if metrics.exists() else 0


@pytest.mark.parametrize("name", ["grpo_async", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_resumes_from_its_checkpoint(
    name: str, pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    words = settings(tiny_llama, pristine_server.url, folder, steps=100_000)
    killed_after, delay_s = random.randint(2, 6), random.uniform(0, 0.5)
    context = f"killed {delay_s:.3f} s after step {killed_after} was written"
    process = start(name, log, [*words, "checkpoint.every=2"])
    try:
        wait_for(lambda: steps_written(folder) >= killed_after, process, log)
        time.sleep(delay_s)
    finally:
        process.kill()
        process.wait()
    before = rows_of(folder)
    kept = recipes.Checkpoints(folder / "checkpoints").latest()
    assert kept is not None, context
    assert kept.step >= killed_after - 2, context
    last = kept.step + 2

    assert run_here(name, ["--resume", str(folder), f"train.steps={last}"])

    rows = check_run(folder, last)
    done = ("step", "reward_mean", "weight_version", "grad_norm")
    assert [[row[key] for key in done] for row in rows[: kept.step]] == [
        [row[key] for key in done] for row in before[: kept.step]
    ], context
    assert rows[kept.step]["learning_rate"] == pytest.approx(1e-2)
    # generated by the resumed weights: the restored trainer agrees with the server
    assert rows[kept.step]["staleness_max"] == 0, context
    assert rows[kept.step]["logprob_gap_max"] < 1e-3, context
    assert (
        gap_to_checkpoint(tiny_llama, kept, [one for one in samples_of(folder) if one["step"] == kept.step + 1]) < 1e-3
    )
    versions = [row["weight_version"] for row in rows]
    assert versions == sorted(set(versions)), context
    assert served_version(pristine_server.url) == versions[-1], context


def gap_to_checkpoint(model_path: Path, kept: recipes.Checkpoint, samples: list[dict[str, Any]]) -> float:
    """Largest gap between the recorded log-probs and those of the checkpoint's weights."""
    model = load(model_path)
    model.load_state_dict(dict(kept.modules["model"]))
    return largest_gap(model, samples)


def test_a_wrong_setting_ends_the_program_with_one_line() -> None:
    path = EXAMPLES / "grpo_async.py"
    with pytest.raises(SystemExit, match=r"^grpo_async\.py: unknown setting 'train\.learning_rate'\."):
        recipes.run_program(path, never, words=["train.learning_rate=1"])


def never(config: Any, resume: bool) -> bool:
    raise AssertionError("nothing may be loaded before the configuration is checked")
