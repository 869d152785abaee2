"""The command ``torchrl-sglang``: one module per subcommand, and their shared options.

Only :func:`main` is imported from outside. This folder may import everything but ``recipes``.
"""

from torchrl_sglang.cli.main import main

__all__ = ["main"]
