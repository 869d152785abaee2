"""What the doctor reports, for good and for faulty environments and servers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang.cli import main
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.doctor import Check, Diagnosis, check_environment, check_server
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


def test_the_environment_check_reports_both_pythons() -> None:
    checks = {check.name: check for check in check_environment(sys.executable)}
    assert "torchrl 0." in checks["trainer's Python"].detail
    assert checks["server's Python"].status == "pass"
    assert "sglang 0.5." in checks["server's Python"].detail


def test_a_python_without_sglang_fails_with_what_to_install(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    check = next(c for c in check_environment(str(bare / "bin" / "python")) if c.name == "server's Python")
    assert check.status == "fail"
    assert "install-cpu-server" in check.next_step


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


def test_nothing_listening_is_a_failure_and_exit_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "http://127.0.0.1:9", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    assert "nothing accepts connections" in said["checks"][-1]["detail"]


def test_a_good_server_is_exit_code_zero(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server:
        assert main(["doctor", server.url]) == 0
    assert "all checks passed" in capsys.readouterr().out
