"""Which servers may be told to open memory of the trainer's GPUs: those that see all of them. No GPU is needed here."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrl_sglang.weights.shared_memory.gpus import can_open_gpu_memory


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    for name in ("proc/7/root", "dev"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(2):
        (tmp_path / f"dev/nvidia{number}").touch()
        (tmp_path / "proc/7/root" / (tmp_path / "dev").relative_to("/")).mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/7/root" / (tmp_path / f"dev/nvidia{number}").relative_to("/")).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({}, {}, True),
        ({"CUDA_VISIBLE_DEVICES": "0"}, {}, True),
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "0,1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}, False),
        ({}, {"CUDA_VISIBLE_DEVICES": "0"}, False),
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "GPU-5a2b"}, False),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, {}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, {}, False),
    ],
)
def test_a_process_opens_gpu_memory_only_if_it_sees_every_gpu_of_ours(
    machine: Path, monkeypatch: pytest.MonkeyPatch, ours: dict[str, str], theirs: dict[str, str], expected: bool
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    environ = "\0".join(f"{name}={value}" for name, value in {"PATH": "/bin", **theirs}.items())
    (machine / "proc/7/environ").write_text(environ)
    assert can_open_gpu_memory(7, proc=machine / "proc", devices=machine / "dev") is expected


def test_a_container_that_was_given_other_gpus_and_another_users_process_do_not(machine: Path) -> None:
    assert not can_open_gpu_memory(7, proc=machine / "proc", devices=machine / "dev")  # its environment can't be read
    (machine / "proc/7/environ").write_text("")
    (machine / "proc/7/root" / (machine / "dev/nvidia1").relative_to("/")).unlink()
    assert not can_open_gpu_memory(7, proc=machine / "proc", devices=machine / "dev")
