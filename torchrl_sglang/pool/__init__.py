"""All servers as one pool. May import: client, protocol, config; rollout, weights, engine and chat import from here."""

from torchrl_sglang.pool.pool import SGLangPool
from torchrl_sglang.pool.resolve import Servers, resolve_pool
from torchrl_sglang.pool.router_client import RouterClient
from torchrl_sglang.pool.state import Adapter, PoolState, SavedWeights, ServerState, WeightState

__all__ = [
    "Adapter",
    "PoolState",
    "RouterClient",
    "SGLangPool",
    "SavedWeights",
    "ServerState",
    "Servers",
    "WeightState",
    "resolve_pool",
]
