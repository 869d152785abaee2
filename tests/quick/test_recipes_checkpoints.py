"""Checkpoints are atomic and restore everything; tables and samples continue without a gap."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchrl_sglang import ConfigError, recipes
from torchrl_sglang.recipes.run.run_folder import RunFolder

SETTINGS = recipes.TrainSettings(lr=0.1, schedule="linear", steps=10)


class Trainer:
    """A model, its optimizer, and a step that draws random numbers."""

    def __init__(self, frozen: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        self.model[0].requires_grad_(not frozen)
        self.optimizer, self.scheduler = recipes.make_optimizer({"model": self.model}, SETTINGS)

    def step(self) -> list[float]:
        noise = torch.rand(4, 3) + random.random()
        self.model(noise).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return [p.detach().sum().item() for p in self.model.parameters()]

    def parts(self) -> dict[str, Any]:
        return {"modules": {"model": self.model}, "optimizer": self.optimizer, "scheduler": self.scheduler}


def save(checkpoints: recipes.Checkpoints, trainer: Trainer, step: int) -> Path:
    return checkpoints.save(step=step, data_position=4 * step, weight_version=step + 1, **trainer.parts())


def test_a_restored_run_repeats_the_steps_exactly(tmp_path: Path) -> None:
    random.seed(1)
    trainer, checkpoints = Trainer(), recipes.Checkpoints(tmp_path)
    trainer.step()
    save(checkpoints, trainer, 1)
    expected = [trainer.step() for _ in range(3)]

    other = Trainer()
    other.step()
    found = checkpoints.latest()
    assert found is not None
    assert (found.step, found.data_position, found.weight_version) == (1, 4, 2)
    found.restore(**other.parts())
    assert [other.step() for _ in range(3)] == expected


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    trainer, checkpoints = Trainer(frozen=True), recipes.Checkpoints(tmp_path)
    save(checkpoints, trainer, 1)
    found = checkpoints.latest()
    assert found is not None
    assert list(found.modules["model"]) == ["1.weight", "1.bias"]
    with pytest.raises(ConfigError, match=r"not this run's.*0\.bias"):
        found.restore(**Trainer().parts())


def test_an_unfinished_checkpoint_is_ignored_and_replaced(tmp_path: Path) -> None:
    trainer, checkpoints = Trainer(), recipes.Checkpoints(tmp_path)
    save(checkpoints, trainer, 1)
    torn = tmp_path / "step-000002.unfinished"
    torn.mkdir()
    (torn / "trainer.pt").write_bytes(b"half of it")
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 1
    save(checkpoints, trainer, 2)
    assert not torn.exists()
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 2


def test_only_the_newest_checkpoints_by_number_are_kept(tmp_path: Path) -> None:
    trainer, checkpoints = Trainer(), recipes.Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 11):
        save(checkpoints, trainer, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000011"]


def test_a_checkpoint_of_other_modules_is_refused(tmp_path: Path) -> None:
    trainer, checkpoints = Trainer(), recipes.Checkpoints(tmp_path)
    save(checkpoints, trainer, 1)
    found = checkpoints.latest()
    assert found is not None
    parts = trainer.parts() | {"modules": {"model": trainer.model, "critic": nn.Linear(1, 1)}}
    with pytest.raises(ConfigError, match="critic"):
        found.restore(**parts)


def write_run(path: Path, steps: range, **options: Any) -> None:
    with RunFolder(path, **options) as folder:
        for step in steps:
            folder.log({"step": step, "reward_mean": torch.tensor(step / 8), "note": f"{step}:1"})
            folder.log_samples([{"step": step, "reward": 1.0}] * 2)
            folder.log_evaluation(step, {"eval_pass_at_1": 0.5})


def test_a_resumed_folder_has_every_step_once_even_if_the_run_was_killed_while_writing(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 5))
    for name, torn in (("metrics.csv", "5,0.6"), ("samples.jsonl", '{"step": 5, "rew')):
        with (tmp_path / name).open("a") as file:
            file.write(torn)
    write_run(tmp_path, range(3, 7), resume_step=2)
    rows = recipes.read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["reward_mean"] for row in rows] == [step / 8 for step in range(1, 7)]
    assert rows[0]["note"] == "1:1"
    assert [row["step"] for row in recipes.read_metrics(tmp_path / "evaluations.csv")] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_an_earlier_run_is_refused_with_the_three_ways_to_go_on(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 4))
    save(recipes.Checkpoints(tmp_path / "checkpoints"), Trainer(), 3)
    before = files_in(tmp_path)
    with pytest.raises(ConfigError) as raised:
        write_run(tmp_path, range(1, 2))
    for part in ("metrics.csv, evaluations.csv, samples.jsonl", f"--resume {tmp_path}", "run.folder=", "--overwrite"):
        assert part in str(raised.value)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("how", [{"overwrite": True}, {"resume_step": 1}])
def test_nothing_changes_before_the_run_begins(tmp_path: Path, how: dict[str, Any]) -> None:
    """The servers start between the folder's making and its beginning, and may fail."""
    write_run(tmp_path, range(1, 4))
    before = files_in(tmp_path)
    with pytest.raises(RuntimeError, match="the servers don't start"), RunFolder(tmp_path, **how):
        raise RuntimeError("the servers don't start")
    assert files_in(tmp_path) == before
    assert not list(RunFolder(tmp_path / "new").path.parent.glob("new"))


def test_only_a_runs_own_files_are_replaced(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 4))
    for name in ("model", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").touch()
    write_run(tmp_path, range(1, 2), overwrite=True)
    assert (tmp_path / "model" / "mine.txt").exists(), "there is no config.yaml, so the model is not a run's"
    assert (tmp_path / "notes" / "mine.txt").exists()


def test_a_new_run_replaces_an_earlier_one_when_told_to(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 4))
    save(recipes.Checkpoints(tmp_path / "checkpoints"), Trainer(), 3)
    write_run(tmp_path, range(1, 2), overwrite=True)
    assert len(recipes.read_metrics(tmp_path / "metrics.csv")) == 1
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2
    assert recipes.Checkpoints(tmp_path / "checkpoints").latest() is None


def test_loggers_receive_every_number_and_an_unknown_logger_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, range(1, 3), loggers=["csv"])
    (scalars,) = (tmp_path / "logs").rglob("reward_mean.csv")
    assert scalars.read_text().splitlines() == ["1,0.125", "2,0.25"]
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        RunFolder(tmp_path, loggers=["wandbb"])


def test_the_report_is_drawn_from_any_columns(tmp_path: Path) -> None:
    nan = float("nan")
    rows = [{"step": 1, "reward_mean": 0.5, "train_s": 1.0, "ess": nan}, {"step": 2, "reward_mean": 1.0, "ess": 0.5}]
    recipes.draw_report(rows, [{"step": 0, "eval_pass_at_1": 0.1}], tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_a_new_column_after_the_first_row_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.log({"step": 1})
        with pytest.raises(ConfigError, match="'late'"):
            folder.log({"step": 2, "late": 3})
