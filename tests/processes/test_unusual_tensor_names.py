"""Tensors whose names are no identifiers, very long, or very many, by every transport."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.fake_sglang import FakeServer, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import SyncConfig, WeightCoverageError, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool

NAMES = [
    "model.layers.0.сеть.вес",
    "model.重み.weight",
    "model.emoji 🙂.weight",
    "model.two words.weight",
    "model.tab\tand\nline.weight",
    "model.'quoted\" \\name.weight",
    "model.100%s{0}.weight",
    "model." + "x" * 5000 + ".weight",
    "model." + "deep." * 200 + "weight",
]


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> Path:
    """``tiny_llama`` with more tensors."""
    folder = tmp_path / "served"
    shutil.copytree(tiny_llama, folder)
    tensors = read_checkpoint(folder)
    tensors |= {name: torch.full((8,), float(index)) for index, name in enumerate(NAMES)}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("transport", ["ipc", "broadcast", "http", "disk"])
def test_a_tensor_arrives_whatever_its_name_is(transport: Any, checkpoint: Path, tmp_path: Path) -> None:
    disk_dir = tmp_path / "saved" if transport == "disk" else None
    config = SyncConfig(transport=transport, bucket_bytes=60_000, disk_dir=disk_dir, verify="full")
    with FakeServer(FakeSettings(model_path=checkpoint, is_found=True)) as server:
        sync = WeightSync(SGLangPool([SGLangClient(server.url)]), config)
        tensors = read_checkpoint(checkpoint)
        for addend in (1, 2):
            newer = {name: tensor + addend for name, tensor in tensors.items()}
            report = sync.push(newer)
            assert report is not None
            assert report.num_tensors == len(tensors)
            assert all(torch.equal(server.weights[0][name], tensor) for name, tensor in newer.items())
        for missing in NAMES[:6]:
            with pytest.raises(WeightCoverageError) as caught:
                sync.push({name: tensor for name, tensor in newer.items() if name != missing})
            assert missing in str(caught.value)
        sync.close()
