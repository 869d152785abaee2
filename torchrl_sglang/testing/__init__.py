"""For tests of code built on this package: tiny models, a small real one, and an echo pool that needs no server.

Other folders import the names below from this package, and the vision model from :mod:`.vision`.
"""

from torchrl_sglang.smollm2 import smollm2_checkpoint
from torchrl_sglang.testing.echo_pool import EchoPool
from torchrl_sglang.testing.models import TinyArch, make_tiny_model

__all__ = ["EchoPool", "TinyArch", "make_tiny_model", "smollm2_checkpoint"]
