"""What tests of code built on this package can use: tiny models, a small real one, an echo pool."""

from torchrl_sglang.testing.models import TinyArch, make_tiny_model
from torchrl_sglang.testing.smollm2 import smollm2_checkpoint

__all__ = ["TinyArch", "make_tiny_model", "smollm2_checkpoint"]
