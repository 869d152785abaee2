"""What the doctor reports, for good and for faulty environments and servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.doctor import Check, Diagnosis, check_server
from torchrl_sglang.doctor.self_test import placed_server


def test_the_table_shows_the_next_step_below_a_failed_check() -> None:
    diagnosis = Diagnosis()
    diagnosis.add(
        Check(name="one", status="pass", detail="fine"),
        Check(name="another", status="fail", detail="broken", next_step="repair it"),
    )
    lines = diagnosis.table(width=80).splitlines()
    assert [line.split() for line in lines] == [
        ["ok", "one", "fine"],
        ["FAIL", "another", "broken"],
        ["->", "repair", "it"],
    ]
    assert not diagnosis.ok


def test_a_server_with_mixed_weights_fails_and_the_next_step_says_what_to_do(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama, weight_version="dirty-3@abcd")) as server:
        checks = {check.name: check for check in check_server(server.url)}
    assert checks["server"].status == "pass"
    assert checks["weights"].status == "fail"
    assert "restart" in checks["weights"].next_step


@pytest.mark.parametrize(
    ("num_gpus", "tp_size", "gpus", "device", "dtype"),
    [
        (0, 1, None, "cpu", "float32"),
        (1, 1, None, "cpu", "float32"),  # NCCL can't connect two processes on one GPU
        (2, 1, (0,), "auto", "bfloat16"),
        (2, 2, None, "cpu", "float32"),  # no GPU would be left for the trainer
        (4, 2, (0, 1), "auto", "bfloat16"),
    ],
)
def test_the_self_test_leaves_the_trainer_the_last_gpu(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, tp_size: int, gpus: Any, device: str, dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    placed = placed_server(ServerConfig(model="m", tp_size=tp_size))
    assert (placed.gpus, placed.device, placed.dtype) == (gpus, device, dtype)
