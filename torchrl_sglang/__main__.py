"""``python -m torchrl_sglang`` is the command ``torchrl-sglang``."""

from __future__ import annotations

import sys

from torchrl_sglang.cli import main

if __name__ == "__main__":
    sys.exit(main())
