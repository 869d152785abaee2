"""Rewards, and what is told beside them, as numbers and JSON: checked when they are given, not when they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang.errors import ConfigError

__all__ = ["as_json_object", "as_reward"]

_LARGEST = 3.4028234663852886e38
"""Of float32, in which rewards are trained on."""
_DEEPEST = 100


def as_reward(value: Any) -> float:
    """A reward as a float.

    Args:
        value: a number, also a bool, or a NumPy array or torch tensor of one element.

    Raises:
        ConfigError: it is no number, or none that float32 can hold.

    Examples:
        >>> as_reward(True)
        1.0
        >>> as_reward(float("nan"))
        Traceback (most recent call last):
        ...
        torchrl_sglang.errors.ConfigError: the reward must be a finite number, got nan
    """
    try:
        number = float(value.item() if hasattr(value, "item") else _no_text(value))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"the reward must be a finite number, got {value!r:.80} ({type(value).__name__})") from error
    if not math.isfinite(number):
        raise ConfigError(f"the reward must be a finite number, got {number}")
    if abs(number) > _LARGEST:
        raise ConfigError(f"the reward {number:g} is larger than float32 can hold, in which rewards are trained on")
    return number


def _no_text(value: Any) -> Any:
    if isinstance(value, (str, bytes)):
        raise TypeError
    return value


def as_json_object(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """A mapping as JSON can hold it: NumPy's and torch's numbers become Python's, arrays and tuples lists.

    Args:
        name: what it is called in errors.
        value: the mapping; ``None`` is an empty one.

    Raises:
        ConfigError: it holds something that JSON has not.

    Examples:
        >>> as_json_object("info", {"steps": (1, 2)})
        {'steps': [1, 2]}
        >>> as_json_object("info", {"loss": float("inf")})
        Traceback (most recent call last):
        ...
        torchrl_sglang.errors.ConfigError: info['loss'] is inf, which JSON can't hold
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a mapping, got {type(value).__name__}")
    made: dict[str, Any] = _plain(name, value, _DEEPEST)
    return made


def _plain(where: str, value: Any, levels: int) -> Any:
    if not levels:
        raise ConfigError(f"{where.partition('[')[0]} is nested more than {_DEEPEST} levels deep")
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int)):
                raise ConfigError(f"{where} has the key {key!r:.80}: keys must be strings, as in JSON")
        return {str(key): _plain(f"{where}[{key!r:.40}]", item, levels - 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(f"{where}[{index}]", item, levels - 1) for index, item in enumerate(value)]
    shown = value if isinstance(value, float) else type(value).__name__
    raise ConfigError(f"{where} is {shown}, which JSON can't hold")
