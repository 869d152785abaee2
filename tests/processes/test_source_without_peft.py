"""Reading a model's weights in a Python that cannot import peft."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None                    # as if it were not installed
import torch
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.source.factory import open_source

model = torch.nn.Linear(2, 3)
checkpoint = Checkpoint.from_specs({n: (p.shape, p.dtype) for n, p in model.named_parameters()})
assert {name for name, _ in open_source(model, checkpoint).tensors()} == {"weight", "bias"}
assert "sglang" not in sys.modules
"""


def test_peft_need_not_be_installed() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_PEFT], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
