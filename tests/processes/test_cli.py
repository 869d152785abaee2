"""The command line in a separate process: exit codes, output, and the environment that install-cpu-server makes."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from torchrl_sglang.cli import main
from torchrl_sglang.cli.main import COMMANDS

NO_SERVER = "http://127.0.0.1:9"


def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchrl_sglang", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_version_names_every_package_that_matters() -> None:
    done = run("version")
    assert done.returncode == 0
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert found["torchrl-sglang"] == version("torchrl-sglang")
    assert {"torchrl", "tensordict", "torch", "transformers", "sglang", "python"} <= found.keys()
    assert found["sglang"] == version("sglang")


def test_the_exit_code_is_that_of_the_process_and_no_traceback_is_shown() -> None:
    done = run("generate", "hi", "--url", NO_SERVER)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("torchrl-sglang: nothing accepts connections at http://127.0.0.1:9")
    assert done.stderr.count("\n") == 1


def test_the_server_environment_gets_torch_first_and_the_rest_without_dependencies(tmp_path: Path) -> None:
    """Uses a script as Python that records its arguments, in place of downloading gigabytes."""
    log = tmp_path / "commands.txt"
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!/bin/sh
echo "$@" >> {log}
case "$*" in
    *version_info*) echo 3 11 ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg" ;;
    *"--requirement"*) [ ! -e {tmp_path}/broken ] || {{ echo "no space left"; exit 3; }} ;;
esac
"""
    )
    fake.chmod(0o755)
    folder = tmp_path / "server"
    (tmp_path / "broken").touch()
    failed = run("install-cpu-server", "--venv", str(folder), "--python", str(fake))
    assert failed.returncode == 1
    assert "no space left" in failed.stderr
    assert "step 3" in failed.stderr
    assert "the same command goes on from here" in failed.stderr

    (tmp_path / "broken").unlink()
    log.unlink()
    done = run("install-cpu-server", "--venv", str(folder), "--python", str(fake))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"ready {folder}/bin/python\n"
    assert f"serve MODEL --python {folder}/bin/python" in done.stderr
    commands = log.read_text().splitlines()
    assert not any(line.startswith("-m venv") for line in commands), "the environment existed already"
    torch, rest = (line for line in commands if " install " in line)
    assert torch.endswith(" torch")
    assert "--no-deps" not in torch
    assert "--constraint" in torch
    assert "--no-deps --requirement" in rest


def test_a_python_that_has_no_packages_for_the_server_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 3 9\n")
    old.chmod(0o755)
    done = run("install-cpu-server", "--venv", str(tmp_path / "server"), "--python", str(old))
    assert done.returncode == 2
    assert "exist for Python 3.11 or 3.12" in done.stderr
    assert not (tmp_path / "server").exists()


def test_a_python_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["install-cpu-server", "--venv", str(tmp_path / "new"), "--python", "/no/python"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "is no Python that runs" in said.err
    assert list(tmp_path.iterdir()) == []


HEAVY = ("torch", "transformers", "torchrl", "tensordict", "numpy", "hydra", "sglang")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["version"], ["--version"], *([name, "--help"] for name in COMMANDS), ["serve", "--prot", "1"]],
)
def test_help_version_and_refusals_load_no_heavy_module(words: list[str]) -> None:
    script = (
        "import sys\nfrom torchrl_sglang.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        f"print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stdout
