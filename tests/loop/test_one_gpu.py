"""The preset for one GPU, on the CPU: the run is an ordinary one, and says what it skips and why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from torchrl_sglang import AsyncSGLang
from torchrl_sglang.recipes import read_metrics
from torchrl_sglang.server import SGLangServer

RECIPE = Path(__file__).parents[2] / "examples" / "grpo.py"


@pytest.mark.slow  # the preset's parts: tests/quick/test_one_gpu.py
@pytest.mark.timeout(300)
def test_the_preset_trains_on_the_cpu_and_says_that_nothing_is_released(
    pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path
) -> None:
    words = [
        *("--preset", "one-gpu", f"model={tiny_llama}", f"engine.url={pristine_server.url}"),
        *(f"run.folder={tmp_path / 'run'}", "train.steps=1", "train.questions=2", "train.answers=2"),
        *("policy.generate_kwargs.max_new_tokens=4", "train.lr=1e-2"),
    ]
    run = subprocess.run([sys.executable, str(RECIPE), *words], capture_output=True, text=True, timeout=280)
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    assert said.count("offload_servers: skipped, since the servers run on the CPU and hold no GPU memory") == 1
    [row] = read_metrics(tmp_path / "run/metrics.csv")
    with AsyncSGLang.connect(pristine_server.url) as servers:
        assert servers.weight_version == row["weight_version"] >= 1
