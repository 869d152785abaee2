"""TorchRL trains, SGLang generates: the policy and the weight sync that make them one system."""

from torchrl_sglang.config import ClientConfig, SamplingParams, ServerConfig, SyncConfig
from torchrl_sglang.errors import SGLangError

__all__ = ["ClientConfig", "SGLangError", "SamplingParams", "ServerConfig", "SyncConfig"]
