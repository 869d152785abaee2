"""The command ``torchrl-sglang``."""

from torchrl_sglang.cli.main import main

__all__ = ["main"]
