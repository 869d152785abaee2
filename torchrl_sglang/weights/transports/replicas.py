"""Refuses servers with several replicas or pipeline stages inside, for transports whose requests reach one of them."""

from __future__ import annotations

from collections.abc import Sequence

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ConfigError

__all__ = ["require_one_replica"]


def require_one_replica(clients: Sequence[SGLangClient]) -> None:
    """Check that an update reaches every rank of each server.

    Raises:
        ConfigError: a server has ranks that it does not reach.
    """
    for client in clients:
        info = client.info
        if info.dp_size > 1:
            raise ConfigError(
                f"{client.url} runs dp_size={info.dp_size} replicas inside one server, and SGLang's weight updates "
                "reach only one of them: use several servers instead (AsyncSGLang.from_pretrained(..., dp_size=N))"
            )
        if info.pp_size > 1:
            raise ConfigError(
                f"{client.url} runs pp_size={info.pp_size} pipeline stages, whose ranks collide in a weight group: "
                "use tensor parallelism, or SyncConfig(transport='disk')"
            )
