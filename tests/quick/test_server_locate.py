"""The search for the Python that runs a server: its order, and an error that names the places."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from torchrl_sglang.cli import main
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server.command import check_config
from torchrl_sglang.server.locate import UNFINISHED, find_python, installed_version

CPU = ServerConfig(model="m", device="cpu")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """This Python has no SGLang."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def install(home: Path, version: str = "0.5.23") -> Path:
    """What ``install-cpu-server`` leaves in its default folder."""
    folder = home / ".cache" / "torchrl-sglang" / "cpu-server"
    about = folder / "lib" / "python3.11" / "site-packages" / f"sglang-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    return folder


def test_this_python_goes_first_when_it_has_all_that_sglang_needs(home: Path) -> None:
    install(home)
    assert find_python(CPU) == sys.executable


def test_a_python_without_sglang_uses_the_installed_cpu_server(home: Path, no_sglang: None) -> None:
    python = install(home) / "bin" / "python"
    assert find_python(CPU) == str(python)
    assert installed_version("sglang", str(python)) == "0.5.23"


def test_a_python_with_an_incomplete_sglang_uses_the_installed_one_if_there_is_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version

    def without_uvloop(name: str) -> str:
        if name == "uvloop":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", without_uvloop)
    assert find_python(CPU) == sys.executable, "its log says what is missing"
    installed = install(home) / "bin" / "python"
    assert find_python(CPU) == str(installed)


def test_the_named_python_goes_before_all_others(home: Path) -> None:
    install(home)
    assert find_python(ServerConfig(model="m", python="/bin/sh")) == "/bin/sh"


def test_an_unfinished_installation_is_not_used_and_the_error_says_so(home: Path, no_sglang: None) -> None:
    (install(home) / UNFINISHED).touch()
    with pytest.raises(ConfigError, match="cpu-server.*did not finish.*Run `torchrl-sglang install-cpu-server`"):
        find_python(CPU)


def test_a_gpu_server_does_not_use_the_cpu_server(home: Path, no_sglang: None) -> None:
    install(home)
    with pytest.raises(ConfigError, match=r"torchrl-sglang\[sglang\].*install-cpu-server") as raised:
        find_python(ServerConfig(model="m", device="cuda"))
    assert "cpu-server)" not in str(raised.value)


def test_without_any_the_error_names_the_places_and_comes_before_a_launch(home: Path, no_sglang: None) -> None:
    with pytest.raises(ConfigError) as raised:
        check_config(CPU)
    said = str(raised.value)
    for part in (sys.executable, str(home / ".cache" / "torchrl-sglang" / "cpu-server"), "not there"):
        assert part in said
    for way in ("ServerConfig(python=...)", "--python", "engine.python=..."):
        assert way in said


def test_a_folder_called_sglang_is_not_sglang(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sglang").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    sys.path_importer_cache.clear()
    with pytest.raises(ConfigError, match="SGLang is not installed"):
        find_python(CPU)


def test_sglang_on_the_servers_own_import_path_counts(home: Path, no_sglang: None, tmp_path: Path) -> None:
    (tmp_path / "checkout" / "sglang").mkdir(parents=True)
    (tmp_path / "checkout" / "sglang" / "__init__.py").touch()
    config = ServerConfig(model="m", device="cpu", env={"PYTHONPATH": f"/elsewhere:{tmp_path / 'checkout'}"})
    assert find_python(config) == sys.executable


def test_the_version_command_shows_the_server_that_would_run(
    home: Path, no_sglang: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["version"]) == 0
    assert "sglang          not installed: torchrl-sglang install-cpu-server" in capsys.readouterr().out
    python = install(home) / "bin" / "python"
    assert main(["--version"]) == 0
    assert f"sglang          0.5.23 (in {python})" in capsys.readouterr().out
