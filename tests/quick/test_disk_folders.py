"""Trainers that share a folder: none deletes another's versions, and what a killed one was writing is removed."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.fake_sglang import FakeServer, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.group.trainer_mark import TrainerMark


@pytest.fixture
def tensors(tiny_llama: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(tiny_llama)


def sync_to(server: FakeServer, folder: Path) -> WeightSync:
    config = SyncConfig(verify="off", transport="disk", disk_dir=folder)
    return WeightSync(SGLangPool([SGLangClient(server.url)]), config)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_each_trainer_keeps_its_own_two_newest_versions(
    tiny_llama: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    settings = FakeSettings(model_path=tiny_llama)
    with (
        FakeServer(settings) as first,
        FakeServer(settings) as second,
        closing(sync_to(first, tmp_path)) as a,
        closing(sync_to(second, tmp_path)) as b,
    ):
        for _ in range(3):
            a.push(tensors)
            b.push(tensors)
        assert names(tmp_path) == {f"version-{number}-{sync.owner}" for number in (2, 3) for sync in (a, b)}


def test_a_version_that_is_pushed_twice_does_not_replace_the_folder_that_a_server_may_be_loading(
    tiny_llama: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server, closing(sync_to(server, tmp_path)) as sync:
        sync.push(tensors, version=7)
        inode = (tmp_path / f"version-7-{sync.owner}").stat().st_ino
        sync.push(tensors, version=7)
        assert names(tmp_path) == {f"version-7-{sync.owner}", f"version-7-{sync.owner}.2"}
        assert (tmp_path / f"version-7-{sync.owner}").stat().st_ino == inode
        saved = sync._pool.state.weights.saved
        assert saved is not None
        assert saved.path.endswith(".2")


def test_what_a_dead_trainer_was_writing_is_removed_and_what_a_live_one_writes_is_not(
    tiny_llama: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    here = TrainerMark.own("other")
    parent = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    partial = {
        "ended": replace(here, started=here.started + 1),
        "another process": replace(here, pid=os.getppid(), started=int(parent)),
        "this process": here,
        "elsewhere, long ago": TrainerMark("other", "00000000", 1, 1),
        "elsewhere, now": TrainerMark("other", "00000000", 2, 1),
    }
    folders = {what: tmp_path / f"version-1-other.partial-{mark}" for what, mark in partial.items()}
    for folder in folders.values():
        folder.mkdir()
        (folder / "model-00001.safetensors").touch()
    long_ago = time.time() - 7200
    for path in (folders["elsewhere, long ago"] / "model-00001.safetensors", folders["elsewhere, long ago"]):
        os.utime(path, (long_ago, long_ago))
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server, closing(sync_to(server, tmp_path)) as sync:
        sync.push(tensors)
    left = {what for what, folder in folders.items() if folder.exists()}
    assert left == {"another process", "this process", "elsewhere, now"}


def test_a_version_that_another_trainer_deletes_meanwhile_is_no_error(
    tiny_llama: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    (tmp_path / "version-9-other").symlink_to(tmp_path / "deleted")  # listed, and not there when it is looked at
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server, closing(sync_to(server, tmp_path)) as sync:
        assert sync.push(tensors) is not None
