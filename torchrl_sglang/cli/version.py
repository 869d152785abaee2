"""Print the versions of this package and of the packages it works with."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "print versions"

_PACKAGES = ("torchrl-sglang", "torchrl", "tensordict", "torch", "transformers", "sglang", "sglang-router")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options."""


def run(args: argparse.Namespace) -> int:
    """Print one line per package, without importing any."""
    for name in _PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed here"
        print(f"{name:<15} {found}")
    print(f"{'python':<15} {platform.python_version()}")
    return 0
