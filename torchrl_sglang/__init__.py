"""TorchRL trains, SGLang generates: this package has the policy and the weight sync that connect them.

Users import every name from here. Names are loaded on first use: settings and errors load no torch, the policy loads
torchrl.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torchrl_sglang.agents import PACKAGES as _AGENTS_PACKAGES
from torchrl_sglang.config import ClientConfig, RouterConfig, SamplingParams, ServerConfig, SyncConfig
from torchrl_sglang.errors import (
    AgentsFailedError,
    ConfigError,
    ContextLengthError,
    LethalPromptError,
    OverloadedError,
    ProtocolError,
    RequestRejectedError,
    ServerError,
    ServerLostError,
    ServerStartError,
    ServerTimeoutError,
    ServerUnreachableError,
    SessionError,
    SessionFinishedError,
    SessionKeyError,
    SGLangError,
    StorageError,
    UnknownSessionError,
    WeightCoverageError,
    WeightSyncError,
    WeightUpdateError,
)

if TYPE_CHECKING:
    from torchrl_sglang.agents.collector import AgentCollector, RunFailure, group_advantages, trajectories_to_batch
    from torchrl_sglang.agents.gateway import AgentGateway, AgentSession
    from torchrl_sglang.agents.remote_gateway import RemoteGateway
    from torchrl_sglang.agents.settings import SessionSettings
    from torchrl_sglang.agents.types import SessionInfo, Trajectory
    from torchrl_sglang.chat import Response, SGLangChat
    from torchrl_sglang.client import SGLangClient
    from torchrl_sglang.engine import AsyncSGLang
    from torchrl_sglang.pool import SGLangPool
    from torchrl_sglang.rollout import Generation, SGLangWrapper, behaviour_log_probs, temper, trainer_log_probs
    from torchrl_sglang.scores import RewardModel, RewardModelTransform
    from torchrl_sglang.server import SGLangServer
    from torchrl_sglang.smollm2 import smollm2_checkpoint
    from torchrl_sglang.weights import SGLangWeightSender, SGLangWeightSyncScheme, SyncReport, WeightSync

__version__ = "0.1.0"

_NEED_AGENTS = {f"torchrl_sglang.agents.{name}" for name in ("collector", "gateway", "remote_gateway")}
_LAZY = {
    "AgentCollector": "torchrl_sglang.agents.collector",
    "AgentGateway": "torchrl_sglang.agents.gateway",
    "AgentSession": "torchrl_sglang.agents.gateway",
    "AsyncSGLang": "torchrl_sglang.engine",
    "Generation": "torchrl_sglang.rollout",
    "RemoteGateway": "torchrl_sglang.agents.remote_gateway",
    "Response": "torchrl_sglang.chat",
    "RewardModel": "torchrl_sglang.scores",
    "RewardModelTransform": "torchrl_sglang.scores",
    "SGLangChat": "torchrl_sglang.chat",
    "SGLangClient": "torchrl_sglang.client",
    "SGLangPool": "torchrl_sglang.pool",
    "SGLangServer": "torchrl_sglang.server",
    "SGLangWeightSender": "torchrl_sglang.weights",
    "SGLangWeightSyncScheme": "torchrl_sglang.weights",
    "SGLangWrapper": "torchrl_sglang.rollout",
    "SessionInfo": "torchrl_sglang.agents.types",
    "SessionSettings": "torchrl_sglang.agents.settings",
    "SyncReport": "torchrl_sglang.weights",
    "Trajectory": "torchrl_sglang.agents.types",
    "WeightSync": "torchrl_sglang.weights",
    "RunFailure": "torchrl_sglang.agents.collector",
    "behaviour_log_probs": "torchrl_sglang.rollout",
    "group_advantages": "torchrl_sglang.agents.collector",
    "smollm2_checkpoint": "torchrl_sglang.smollm2",
    "temper": "torchrl_sglang.rollout",
    "trainer_log_probs": "torchrl_sglang.rollout",
    "trajectories_to_batch": "torchrl_sglang.agents.collector",
}

__all__ = [
    "AgentCollector",
    "AgentGateway",
    "AgentSession",
    "AgentsFailedError",
    "AsyncSGLang",
    "ClientConfig",
    "ConfigError",
    "ContextLengthError",
    "Generation",
    "LethalPromptError",
    "OverloadedError",
    "ProtocolError",
    "RemoteGateway",
    "RequestRejectedError",
    "Response",
    "RewardModel",
    "RewardModelTransform",
    "RouterConfig",
    "RunFailure",
    "SGLangChat",
    "SGLangClient",
    "SGLangError",
    "SGLangPool",
    "SGLangServer",
    "SGLangWeightSender",
    "SGLangWeightSyncScheme",
    "SGLangWrapper",
    "SamplingParams",
    "ServerConfig",
    "ServerError",
    "ServerLostError",
    "ServerStartError",
    "ServerTimeoutError",
    "ServerUnreachableError",
    "SessionError",
    "SessionFinishedError",
    "SessionInfo",
    "SessionKeyError",
    "SessionSettings",
    "StorageError",
    "SyncConfig",
    "SyncReport",
    "Trajectory",
    "UnknownSessionError",
    "WeightCoverageError",
    "WeightSync",
    "WeightSyncError",
    "WeightUpdateError",
    "behaviour_log_probs",
    "group_advantages",
    "smollm2_checkpoint",
    "temper",
    "trainer_log_probs",
    "trajectories_to_batch",
]

# Without the extra `agents`, `from torchrl_sglang import *` leaves its names out; importing one names the extra.
if any(find_spec(package) is None for package in _AGENTS_PACKAGES):
    for _name, _module in _LAZY.items():
        if _module not in _NEED_AGENTS:
            continue
        __all__.remove(_name)


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
