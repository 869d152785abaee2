"""The examples, run from the command line against a real server with a tiny model."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.fake_sglang.fake_python import make_python
from tests.loop.rollout_cases import largest_gap
from tests.loop.sync_cases import load
from torchrl_sglang.server import SGLangServer

EXAMPLES = Path(__file__).parents[2] / "examples"
FIRST_COLUMNS = [
    *("step", "reward_mean", "response_tokens_mean", "generate_tokens_per_s", "sync_s", "sync_mb", "weight_version"),
    "logprob_gap_max",
]
STEPS, QUESTIONS, ANSWERS = 3, 2, 4
DEADLINE_S = 500.0

pytestmark = [pytest.mark.usefixtures("needs_sglang"), pytest.mark.timeout(2 * DEADLINE_S)]


def start_example(log: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    # a file instead of a pipe, which would fill up while the example runs
    with log.open("w") as output:
        command = [sys.executable, str(EXAMPLES / name), *words]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def watch(example: subprocess.Popen[bytes], until: Callable[[], bool] = lambda: False) -> set[psutil.Process]:
    """Wait for the end of ``example`` (or for ``until``); returns all its child processes."""
    parent, seen, deadline = psutil.Process(example.pid), set(), time.monotonic() + DEADLINE_S
    while example.poll() is None and not until():
        assert time.monotonic() < deadline, f"{example.args} did not end within {DEADLINE_S} s"
        try:
            seen.update(parent.children(recursive=True))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.1)
    return seen


def still_alive(processes: set[psutil.Process]) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def kill(example: subprocess.Popen[bytes]) -> None:
    if example.poll() is None:
        example.kill()  # its server ends with it
        example.wait()


def grpo_arguments(model: Path, output: Path, steps: int) -> list[str]:
    # A high learning rate: a tiny random model must change visibly within a step.
    return [
        *(f"model={model}", f"run.folder={output}", f"train.steps={steps}", f"train.questions={QUESTIONS}"),
        *(
            f"train.answers={ANSWERS}",
            "train.micro_batch=3",
            "policy.generate_kwargs.max_new_tokens=6",
            "train.lr=1e-2",
            "checkpoint.previous=true",
        ),
    ]


@pytest.fixture(scope="module")
def quickstart(needs_sglang: None, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("quickstart")
    log = output / "log.txt"
    example = start_example(log, "grpo.py", *grpo_arguments(tiny_llama, output, STEPS))
    try:
        processes = watch(example)
    finally:
        kill(example)
    assert example.returncode == 0, log.read_text()[-4000:]
    rows = list(csv.DictReader((output / "metrics.csv").open()))
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    return SimpleNamespace(output=output, log=log.read_text(), rows=rows, samples=samples, processes=processes)


def test_quickstart_prints_and_logs_every_step(quickstart: Any) -> None:
    assert list(quickstart.rows[0])[: len(FIRST_COLUMNS)] == FIRST_COLUMNS
    assert [int(row["step"]) for row in quickstart.rows] == list(range(1, STEPS + 1))
    for row in quickstart.rows:
        assert f"step {int(row['step']):3d} | reward {float(row['reward_mean']):.3f}" in quickstart.log
        assert 0 < float(row["response_tokens_mean"]) <= 6
        assert float(row["generate_tokens_per_s"]) > 0
        assert float(row["sync_s"]) > 0
        assert float(row["sync_mb"]) > 0.1


def test_quickstart_raises_the_weight_version_by_one_per_step(quickstart: Any) -> None:
    assert [int(row["weight_version"]) for row in quickstart.rows] == list(range(1, STEPS + 1))
    assert [sample["weight_version"] for sample in quickstart.samples] == [
        step for step in range(STEPS) for _ in range(QUESTIONS * ANSWERS)
    ]


def test_quickstart_keeps_server_and_trainer_in_agreement(quickstart: Any) -> None:
    assert all(float(row["logprob_gap_max"]) < 1e-3 for row in quickstart.rows)


def test_quickstart_asks_each_question_as_often_as_a_group_is_large(quickstart: Any) -> None:
    for step in range(1, STEPS + 1):
        prompts = [sample["prompt"] for sample in quickstart.samples if sample["step"] == step]
        groups = [prompts[i : i + ANSWERS] for i in range(0, len(prompts), ANSWERS)]
        assert len(groups) == QUESTIONS
        assert all(len(set(group)) == 1 for group in groups)


def test_quickstart_rewards_what_its_task_says(quickstart: Any) -> None:
    mean = sum(sample["reward"] for sample in quickstart.samples if sample["step"] == 1) / (QUESTIONS * ANSWERS)
    assert float(quickstart.rows[0]["reward_mean"]) == pytest.approx(mean, abs=1e-5)
    for sample in quickstart.samples:
        assert 0 <= sample["reward"] <= 1
        if not any(character.isdigit() for character in sample["response"]):
            assert sample["reward"] == 0


def test_the_previous_checkpoint_made_the_last_samples_and_the_last_one_did_not(quickstart: Any) -> None:
    last = [sample for sample in quickstart.samples if sample["step"] == STEPS]
    assert largest_gap(load(quickstart.output / "checkpoint-previous"), last) < 1e-3
    # in one of 500 runs no answer contains a number: rewards are equal, and no update changes the weights
    rewards = [sample["reward"] for sample in quickstart.samples]
    groups = [rewards[i : i + ANSWERS] for i in range(0, len(rewards), ANSWERS)]
    learned = any(len(set(group)) > 1 for group in groups)
    assert (largest_gap(load(quickstart.output / "checkpoint"), last) > 1e-2) == learned


def test_quickstart_draws_a_report(quickstart: Any) -> None:
    assert (quickstart.output / "report.png").read_bytes().startswith(b"\x89PNG")


def test_quickstart_leaves_no_process(quickstart: Any) -> None:
    assert len(quickstart.processes) >= 2  # checks the watching itself: there was a server
    assert still_alive(quickstart.processes) == []


@pytest.mark.parametrize("kind", ["fake", pytest.param("real", marks=pytest.mark.slow)])
def test_interrupting_the_quickstart_stops_the_server_keeps_what_was_measured_and_saves(
    tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    metrics, log = tmp_path / "metrics.csv", tmp_path / "log.txt"
    words = grpo_arguments(tiny_llama, tmp_path, 100_000)
    if kind == "fake":  # starts within seconds; its log-probs are no model's
        words += [f"engine.python={make_python(tmp_path)}", "+weight_sync_schemes.policy.config.verify=off"]
    example = start_example(log, "grpo.py", *words)
    try:
        processes = watch(example, until=lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
        example.send_signal(signal.SIGINT)
        example.wait(timeout=60)
    finally:
        kill(example)
    printed = log.read_text()
    assert example.returncode == 1, printed[-4000:]
    assert f"finished steps are in {tmp_path}" in printed
    assert "Traceback" not in printed
    assert len(processes) >= 2
    assert still_alive(processes) == []
    steps = [int(row["step"]) for row in csv.DictReader(metrics.open())]
    assert steps == list(range(1, len(steps) + 1))
    assert steps
    assert f"--resume {tmp_path}" in printed
    assert (tmp_path / "checkpoints" / f"step-{len(steps):06d}" / "trainer.pt").exists()


def test_generate_example_answers_every_question(server: SGLangServer, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    example = start_example(log, "generate.py", "--url", server.url, "What is 1 + 1?", "Who are you?", "Why?")
    try:
        example.wait(timeout=DEADLINE_S)
    finally:
        kill(example)
    printed = log.read_text()
    assert example.returncode == 0, printed[-4000:]
    assert printed.count("tokens, log-prob -") == 3
    assert printed.count("weights v0") == 3
