"""A disk that is full while files are written: the error says what was missing, and nothing incomplete stays.

The kernel's limit on the size of files takes the full disk's place: writes fail in the same calls, in every container.
"""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchrl_sglang import recipes
from torchrl_sglang.disk_space import writing
from torchrl_sglang.errors import ConfigError, StorageError
from torchrl_sglang.recipes.run.run_folder import RunFolder
from torchrl_sglang.recipes.run.table import Table, read_metrics

LIMIT = 200_000


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file grows beyond ``LIMIT`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save(checkpoints: recipes.Checkpoints, model: nn.Module, step: int) -> Path:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    parts: dict[str, Any] = {"modules": {"model": model}, "optimizer": optimizer, "scheduler": scheduler}
    return checkpoints.save(step=step, data_position=step, weight_version=step, **parts)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_checkpoint_that_does_not_fit_leaves_nothing_and_the_last_one_stays(tmp_path: Path) -> None:
    checkpoints = recipes.Checkpoints(tmp_path / "checkpoints")
    small, large = nn.Linear(2, 2), nn.Linear(1000, 1000)
    with small_files(), pytest.raises(StorageError, match="There is no earlier checkpoint") as first:
        save(checkpoints, large, 1)
    assert files(tmp_path / "checkpoints") == []
    assert first.value.needed_bytes is not None
    assert 4_004_000 <= first.value.needed_bytes < 4_100_000
    save(checkpoints, small, 1)
    with small_files(), pytest.raises(StorageError, match="The last complete checkpoint is step-000001") as second:
        save(checkpoints, large, 2)
    assert files(tmp_path / "checkpoints") == ["step-000001", "step-000001/trainer.pt"]
    assert "It takes 4" in str(second.value)
    assert "are free on that disk" in str(second.value)
    assert second.value.errno == errno.EFBIG
    assert isinstance(second.value, OSError)
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 1
    with small_files(), pytest.raises(StorageError):
        save(checkpoints, large, 1)
    assert checkpoints.latest() is not None, "the checkpoint of the same step stays until the new one is complete"
    save(checkpoints, large, 2)
    assert files(tmp_path / "checkpoints") == ["step-000002", "step-000002/trainer.pt"]


def test_what_a_killed_run_has_left_is_removed_by_the_next_checkpoint(tmp_path: Path) -> None:
    left = tmp_path / "step-000007.unfinished"
    left.mkdir()
    (left / "trainer.pt").write_bytes(b"x")
    save(recipes.Checkpoints(tmp_path), nn.Linear(2, 2), 8)
    assert files(tmp_path) == ["step-000008", "step-000008/trainer.pt"]


def test_a_run_whose_folder_is_full_says_so_and_its_files_stay_readable(tmp_path: Path) -> None:
    with (
        small_files(),
        pytest.raises(StorageError, match="the samples could not be written to"),
        RunFolder(tmp_path) as run,
    ):
        run.log_samples([{"step": 1, "text": "x" * LIMIT}, {"step": 1, "text": "y"}])
    table = Table(tmp_path / "table.csv")
    table.add({"step": 1, "text": "a"})
    with small_files(), pytest.raises(StorageError, match="the table could not be written to"):
        table.add({"step": 2, "text": "x" * LIMIT})
    assert read_metrics(tmp_path / "table.csv") == [{"step": 1, "text": "a"}]


def test_a_report_that_does_not_fit_leaves_no_part_of_it(tmp_path: Path) -> None:
    def draw(_rows: Any, _evaluations: Any, path: Path) -> None:
        with path.with_name(f".{path.name}").open("wb") as file:
            file.write(bytes(2 * LIMIT))

    run = RunFolder(tmp_path, draw=draw)
    run.log({"step": 1})
    with small_files(), pytest.raises(StorageError, match="the report could not be written"):
        run.close()
    assert files(tmp_path) == ["metrics.csv", "samples.jsonl"]


def test_other_errors_pass_unchanged_and_what_is_incomplete_is_removed_all_the_same(tmp_path: Path) -> None:
    for error in (KeyError("a"), FileNotFoundError(errno.ENOENT, "no"), ConfigError("x"), KeyboardInterrupt()):
        incomplete = tmp_path / "part"
        incomplete.mkdir()
        with pytest.raises(type(error)) as caught, writing(tmp_path, "it", incomplete=incomplete):
            raise error
        assert caught.value is error
        assert not incomplete.exists()
    with (
        pytest.raises(StorageError, match=r"No space left on device\. .* free on that disk\. Make room") as caught_full,
        writing(tmp_path / "new" / "file", "it"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught_full.value.free_bytes is not None
