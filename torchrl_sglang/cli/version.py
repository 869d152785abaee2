"""Print the versions of this package and of the packages it works with, and which Python would run a server."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server.locate import find_python, installed_version

__all__ = ["add_arguments", "run"]

_PACKAGES = ("torchrl-sglang", "torchrl", "tensordict", "torch", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options."""


def run(args: argparse.Namespace) -> int:
    """Print one line per package, without importing any."""
    for name in _PACKAGES:
        print(f"{name:<15} {_version(name) or 'not installed here'}")
    print(f"{'sglang':<15} {_sglang()}")
    print(f"{'sglang-router':<15} {_version('sglang-router') or 'not installed here'}")
    print(f"{'python':<15} {platform.python_version()} ({sys.executable})")
    return 0


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sglang() -> str:
    """The version that a launched server would run."""
    try:
        python = find_python(ServerConfig(model="-"))
    except ConfigError:
        return "not installed: torchrl-sglang install-cpu-server, or see torchrl-sglang doctor"
    where = "" if python == sys.executable else f" (in {python})"
    return f"{installed_version('sglang', python)}{where}"
