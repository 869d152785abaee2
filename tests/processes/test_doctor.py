"""The doctor's checks of a Python environment, which run that Python in a process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang.cli import main
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.doctor import Check, check_environment


def checks_of(config: ServerConfig, *, launches: bool = True) -> dict[str, Check]:
    return {check.name: check for check in check_environment(config, launches=launches)}


def test_the_environment_check_reports_both_pythons() -> None:
    checks = checks_of(ServerConfig(model="-", device="cpu"))
    assert "torchrl 0." in checks["trainer's Python"].detail
    assert checks["server's Python"].status == "pass"
    assert "sglang 0.5." in checks["server's Python"].detail


def test_a_python_without_sglang_fails_with_what_to_install(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    config = ServerConfig(model="-", python=str(bare / "bin" / "python"))
    assert checks_of(config)["server's Python"].status == "fail"
    assert "install-cpu-server" in checks_of(config)["server's Python"].next_step
    assert checks_of(config, launches=False)["server's Python"].status == "skip"


def test_the_doctor_finds_the_cpu_server_and_needs_none_for_a_remote_one(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    # This Python has no SGLang.
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sglang" else find_spec(name))
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "Looked in this Python" in " ".join(capsys.readouterr().out.split())
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server:
        assert main(["doctor", server.url]) == 0
    assert "none is needed" in capsys.readouterr().out

    installed = tmp_path / ".cache" / "torchrl-sglang" / "cpu-server"  # a link to an environment that has SGLang
    installed.parent.mkdir(parents=True)
    installed.symlink_to(sys.prefix)
    assert main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "all checks passed" in said
    assert "cpu-server/bin/python: sglang" in " ".join(said.split())


def test_nothing_listening_is_a_failure_and_exit_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "http://127.0.0.1:9", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    assert "nothing accepts connections" in said["checks"][-1]["detail"]


def test_a_good_server_is_exit_code_zero(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server:
        assert main(["doctor", server.url]) == 0
    assert "all checks passed" in capsys.readouterr().out
