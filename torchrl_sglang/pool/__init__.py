"""Several servers behind one ``generate``, and the pool's state: one record per server.

Other folders import the names below from this package. This folder imports client, protocol, config, errors and
``parallel``.
"""

from torchrl_sglang.pool.following import ServerListFollower
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
    "ServerListFollower",
    "ServerState",
    "Servers",
    "WeightState",
    "resolve_pool",
]
