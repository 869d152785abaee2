"""Importing the rollout loads none of the code that changes weights or starts servers."""

from __future__ import annotations

import subprocess
import sys

LIST_MODULES = "import sys, torchrl_sglang.rollout; print(*(m for m in sys.modules if m.startswith('torchrl_sglang.')))"


def test_importing_the_rollout_loads_no_module_of_weights_or_engine() -> None:
    result = subprocess.run([sys.executable, "-c", LIST_MODULES], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[1] for name in result.stdout.split()}
    assert {"rollout", "pool", "client"} <= loaded
    assert loaded.isdisjoint({"weights", "engine", "server", "testing", "recipes"})
