"""Warns of servers that hold weights of an earlier run: what they generate is not the checkpoint's."""

from __future__ import annotations

import warnings

from torchrl_sglang.pool.pool import SGLangPool
from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["earlier_weights", "warn_of_earlier_weights"]


def earlier_weights(pool: SGLangPool) -> dict[str, str]:
    """The servers that held other weights than their checkpoint's when the pool connected, and got no update since.

    Args:
        pool: connected servers.

    Returns:
        URL to version string. Servers with half-updated weights are left out: they are quarantined.
    """
    held = {url: server.version for url, server in pool.state.servers.items() if not server.complete_from}
    return {url: version for url, version in held.items() if _is_earlier(WeightVersion.parse(version))}


def warn_of_earlier_weights(pool: SGLangPool, *, stacklevel: int = 3) -> None:
    """Warn if servers hold weights of an earlier run.

    Args:
        pool: connected servers.
        stacklevel: frames between this function and the code that the warning is shown for.
    """
    for url, version in earlier_weights(pool).items():
        warnings.warn(
            f"{url} holds weights of an earlier run (version {version!r}), not those of its checkpoint, and generates "
            "with them. Before the first rollout of a new run, send your model's: servers.update_weights(model), or "
            "SGLangWeightSyncScheme(servers, model=model)",
            stacklevel=stacklevel,
        )


def _is_earlier(version: WeightVersion) -> bool:
    return not version.dirty and version.number != 0
