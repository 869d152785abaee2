"""The disk transport on a full disk: the servers keep their weights, and no part of a version stays."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang import SGLangPool, StorageError, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_version_that_does_not_fit_reaches_no_server_and_the_next_one_does(
    fake: FakeServer, model: Any, tmp_path: Path
) -> None:
    pool = SGLangPool([SGLangClient(fake.url)])
    sync = WeightSync(pool, SyncConfig(transport="disk", disk_dir=tmp_path, verify="off"))
    before = SGLangClient(fake.url).weight_version()
    with small_files(50_000), pytest.raises(StorageError, match="no server was told anything") as caught:
        sync.push(model)
    assert list(tmp_path.iterdir()) == []
    tensors = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    assert caught.value.needed_bytes is not None
    assert tensors <= caught.value.needed_bytes <= 1.2 * tensors
    assert SGLangClient(fake.url).weight_version() == before
    sync.push(model)
    (version,) = tmp_path.iterdir()
    assert version.name.startswith("version-1")
    assert (version / "model.safetensors.index.json").is_file()
    assert SGLangClient(fake.url).weight_version() != before
    sync.close()
    pool.close()
