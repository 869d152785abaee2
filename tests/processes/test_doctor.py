"""The doctor's checks of a Python environment, which run that Python in a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang.cli import main
from torchrl_sglang.doctor import check_environment


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


def test_nothing_listening_is_a_failure_and_exit_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "http://127.0.0.1:9", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    assert "nothing accepts connections" in said["checks"][-1]["detail"]


def test_a_good_server_is_exit_code_zero(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server:
        assert main(["doctor", server.url]) == 0
    assert "all checks passed" in capsys.readouterr().out
