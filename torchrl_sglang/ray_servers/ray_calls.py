"""Calls to Ray: the import when it is first needed, and results of actors with this package's errors."""

from __future__ import annotations

from typing import Any

from torchrl_sglang.errors import ConfigError, ServerError, SGLangError

__all__ = ["get_result", "import_ray", "is_done"]

_RESULT_TIMEOUT_S = 30.0
"""An actor does nothing but answer calls: one that takes longer is unreachable, or its node is."""


def import_ray() -> Any:
    """The module ``ray``.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ConfigError("Ray is not installed: pip install 'torchrl-sglang[ray]'") from error
    return ray


def is_done(future: Any, wait_s: float = 1.0) -> bool:
    """Whether a call to an actor has ended; waits up to ``wait_s`` for it."""
    return bool(import_ray().wait([future], timeout=wait_s)[0])


def get_result(future: Any, error_type: type[ServerError] = ServerError) -> Any:
    """What a call to an actor returned.

    Args:
        future: Ray's reference of the call.
        error_type: raised when the actor has died or does not answer.

    Raises:
        SGLangError: the error that the call raised in the actor, or ``error_type``.
    """
    ray = import_ray()
    try:
        return ray.get(future, timeout=_RESULT_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SGLangError):
            raise error.cause from None
        raise
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        raise error_type(f"the Ray actor of a server has died, or its node is unreachable: {error}") from error
