"""Which Python runs a server: one search order for every way to launch one.

1. the one that the settings name (``ServerConfig(python=...)``, ``--python``, ``engine.python=...``);
2. this one, if SGLang is installed in it with the packages it needs;
3. for a server without a GPU, the one that ``torchrl-sglang install-cpu-server`` made;
4. this one, if SGLang is installed in it at all: its log then says what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server.cpu import REQUIREMENTS_PATH, needs_cpu_engine

__all__ = ["CPU_SERVER", "UNFINISHED", "cpu_server_python", "find_python", "installed_version", "missing_packages"]

CPU_SERVER = Path("~/.cache/torchrl-sglang/cpu-server")
"""Folder of ``torchrl-sglang install-cpu-server``, unless its ``--venv`` names another."""

UNFINISHED = ".installing"
"""A file in that folder while the installation is not complete."""


def find_python(config: ServerConfig) -> str:
    """Path of the Python that runs the server.

    Raises:
        ConfigError: ``config.python`` is not an executable file, or no Python with SGLang was found; the message names
            the places.
    """
    if config.python is not None:
        return _given(config.python)
    has_sglang = _is_importable(config)
    cpu = needs_cpu_engine(config)
    if has_sglang and not (cpu and missing_packages()):
        return sys.executable
    installed = cpu_server_python() if cpu else None
    if installed is not None:
        return installed
    if has_sglang:
        return sys.executable
    raise ConfigError(_not_found(cpu))


def cpu_server_python(folder: Path = CPU_SERVER) -> str | None:
    """The Python of a complete ``install-cpu-server`` in ``folder``; ``None`` if there is none."""
    folder = folder.expanduser()
    python = folder / "bin" / "python"
    complete = python.is_file() and not (folder / UNFINISHED).exists() and installed_version("sglang", str(python))
    return str(python) if complete else None


def installed_version(package: str, python: str) -> str | None:
    """Version of a package in an environment, read from its files; ``None`` if it is not there.

    Args:
        package: name on the package index.
        python: the environment's Python, ``<folder>/bin/python``; another layout is not understood.
    """
    if python == sys.executable:
        paths = list(sys.path)
    else:
        paths = [str(path) for path in Path(python).parent.parent.glob("lib*/python3*/site-packages")]
    found = next(iter(metadata.distributions(name=package, path=paths)), None)
    return None if found is None else found.version


def missing_packages() -> list[str]:
    """Packages that SGLang's CPU engine needs and this Python lacks, whatever their versions."""
    names = re.findall(r"^([\w.-]+)==", REQUIREMENTS_PATH.read_text(), re.MULTILINE)
    return [name for name in names if not _is_installed(name)]


def _given(python: str) -> str:
    found = shutil.which(str(Path(python).expanduser()))
    if found is None:
        raise ConfigError(
            f"python={python!r} is not an executable file. Give the path of a Python that has SGLang installed; "
            "without a GPU, `torchrl-sglang install-cpu-server --venv DIR` makes one at DIR/bin/python."
        )
    return str(Path(found).absolute())  # not resolved: a virtual environment's Python is a link that must stay one


def _is_importable(config: ServerConfig) -> bool:
    """Whether this Python imports SGLang, also from a folder of the server's own PYTHONPATH; nothing is imported."""
    spec = importlib.util.find_spec("sglang")
    if spec is not None and spec.origin is not None:  # without: any folder of that name in the current directory
        return True
    paths = config.env.get("PYTHONPATH", "").split(os.pathsep)
    return any((Path(path) / "sglang" / "__init__.py").is_file() for path in paths if path)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _not_found(cpu: bool) -> str:
    looked = [f"this Python ({sys.executable}): SGLang is not installed"]
    if cpu:
        folder = CPU_SERVER.expanduser()
        state = "its installation did not finish" if (folder / UNFINISHED).exists() else "not there"
        looked.append(f"the folder of `torchrl-sglang install-cpu-server` ({folder}): {state}")
        advice = "Run `torchrl-sglang install-cpu-server` (a few minutes, 3 GB)"
    else:
        advice = (
            'Run `pip install "torchrl-sglang[sglang]"`, or, to serve without the GPU, `torchrl-sglang '
            "install-cpu-server` and device='cpu'"
        )
    return (
        f"no Python with SGLang was found to run the server. Looked in {'; '.join(looked)}. {advice}, or name the "
        "Python of another environment that has SGLang: ServerConfig(python=...), --python, or engine.python=..."
    )
