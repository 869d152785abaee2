"""All servers as one: :class:`SGLangPool`."""

from torchrl_sglang.pool.pool import SGLangPool
from torchrl_sglang.pool.resolve import Servers, resolve_pool
from torchrl_sglang.pool.router_client import RouterClient
from torchrl_sglang.pool.state import Adapter, SavedWeights

__all__ = ["Adapter", "RouterClient", "SGLangPool", "SavedWeights", "Servers", "resolve_pool"]
