"""All servers as one: :class:`SGLangPool`."""

from torchrl_sglang.pool.front import RouterFront
from torchrl_sglang.pool.members import Adapter, SavedWeights
from torchrl_sglang.pool.pool import SGLangPool

__all__ = ["Adapter", "RouterFront", "SGLangPool", "SavedWeights"]
