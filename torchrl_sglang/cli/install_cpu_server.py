"""Make a virtual environment with an SGLang server that runs without a GPU.

It holds SGLang and exactly the packages that SGLang's CPU engine needs (SGLang's own requirements are those of its GPU
build). This takes a few minutes and about 3 GB. Afterwards:

    torchrl-sglang serve MODEL

or, if it is in another folder (--venv), torchrl-sglang serve MODEL --python DIR/bin/python

The packages exist for Python 3.11 and 3.12.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from torchrl_sglang.errors import ConfigError, ServerError
from torchrl_sglang.server.cpu import REQUIREMENTS_PATH
from torchrl_sglang.server.locate import CPU_SERVER, UNFINISHED

__all__ = ["add_arguments", "run"]

_PYTHONS = ((3, 11), (3, 12))
_IMPORTS = "import torch, transformers; import importlib.util as u; assert u.find_spec('sglang'), 'sglang is missing'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--venv", type=Path, default=CPU_SERVER, metavar="DIR", help=f"where to make it (default: {CPU_SERVER})"
    )
    parser.add_argument(
        "--python", metavar="PATH", help="Python to make it with (default: this one, else python3.12 or python3.11)"
    )


def run(args: argparse.Namespace) -> int:
    """Make the environment, or update an existing one."""
    folder = args.venv.expanduser().absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise ConfigError(f"{folder} exists and is no virtual environment: name another folder with --venv")
    base = _choose_python(args.python)
    python = folder / "bin" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()  # until this is removed, no command takes this environment for a server's
    if not python.exists():
        _step(1, f"an empty environment in {folder}", [base, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    # torch first, with its dependencies: pip takes the CPU build if the index has one, else the CUDA build, which also
    # works without a GPU, but not without its libraries.
    _step(2, "torch", [*pip, "--constraint", str(REQUIREMENTS_PATH), "torch"])
    # Then exactly the listed packages: SGLang's own dependencies are those of its GPU build.
    count = sum("==" in line for line in REQUIREMENTS_PATH.read_text().splitlines())
    what = f"SGLang and what it needs, {count} packages"
    _step(3, what, [*pip, "--no-deps", "--requirement", str(REQUIREMENTS_PATH)])
    _step(4, "check that it can be imported", [str(python), "-P", "-c", _IMPORTS])
    (folder / UNFINISHED).unlink()
    print(f"ready {python}")
    is_default = folder == CPU_SERVER.expanduser().absolute()
    option, argument = ("", "") if is_default else (f" --python {python}", f', python="{python}"')
    print(f"Serve a model:      torchrl-sglang serve MODEL{option}", file=sys.stderr)
    print(f'Or try a small one: torchrl-sglang generate --model SmolLM2 --chat "Hi!"{option}', file=sys.stderr)
    print(f"From Python:        AsyncSGLang.from_pretrained(MODEL{argument})", file=sys.stderr)
    return 0


def _choose_python(named: str | None) -> str:
    """The Python to make the environment with.

    Raises:
        ConfigError: the named one does not fit, or none was found.
    """
    wanted = " or ".join(".".join(map(str, each)) for each in _PYTHONS)
    if named is not None:
        if (version := _python_version(named)) not in _PYTHONS:
            found = ".".join(map(str, version))
            raise ConfigError(f"SGLang's CPU packages exist for Python {wanted}, and {named} is {found}: name another")
        return named
    if sys.version_info[:2] in _PYTHONS:
        return sys.executable
    for name in ("python3.12", "python3.11"):
        path = shutil.which(name)
        with contextlib.suppress(ConfigError):  # a launcher without that version behind it
            if path is not None and _python_version(path) in _PYTHONS:
                return path
    mine = ".".join(map(str, sys.version_info[:2]))
    raise ConfigError(
        f"SGLang's CPU packages exist for Python {wanted}. This one is {mine}, and no python3.12 or python3.11 is on "
        "the PATH: install one, or name it with --python. This package itself may stay in this environment."
    )


def _python_version(python: str) -> tuple[int, ...]:
    question = "import sys; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", question], check=True, capture_output=True, text=True, timeout=60)
        return tuple(map(int, answer.stdout.split()))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"--python {python} is no Python that runs: {error}") from error


def _step(number: int, what: str, command: list[str]) -> None:
    """Run one step with its output on standard error, so that a slow download shows what it does."""
    print(f"{number}/4  {what}", file=sys.stderr, flush=True)
    safe = {**os.environ, "PYTHONSAFEPATH": "1"}  # not the modules of the working directory
    done = subprocess.run(command, stdout=sys.stderr, check=False, env=safe)
    if done.returncode != 0:
        raise ServerError(
            f"step {number} ({what}) failed with exit code {done.returncode}; its output is above. Finished steps are "
            "kept: the same command goes on from here"
        )
