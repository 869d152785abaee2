"""The reward of one run of an agent: what a function returned, or the last line that a program printed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchrl_sglang.agents.collector.failures import RunFailedError

__all__ = ["Reward", "read_last_line", "read_returned"]

_FORM = 'a number, or {"reward": NUMBER, "info": {...}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward, and what else is known about the run.

    Attributes:
        value: a finite number.
        info: anything to find in the batch, as JSON.
    """

    value: float
    info: Mapping[str, Any] = field(default_factory=dict)


def read_returned(returned: Any) -> Reward | None:
    """The reward that a function returned; ``None`` if it returned none.

    Args:
        returned: a number (also a NumPy or torch scalar), ``{"reward": number, "info": {...}}``, or ``None``.

    Raises:
        RunFailedError: it is something else, or not finite.

    Examples:
        >>> read_returned(True).value, read_returned({"reward": 0.5, "info": {"right": False}}).info
        (1.0, {'right': False})
        >>> read_returned(None) is None
        True
    """
    if returned is None:
        return None
    info: Any = {}
    if isinstance(returned, Mapping):
        unknown = sorted(map(str, set(returned) - {"reward", "info"}))
        if "reward" not in returned or unknown:
            what = f"unknown fields {unknown}" if unknown else "no field 'reward'"
            raise RunFailedError("bad reward", f"the agent returned a mapping with {what}; it must be {_FORM}")
        returned, info = returned["reward"], returned.get("info") or {}
        if not isinstance(info, Mapping):
            raise RunFailedError("bad reward", f"info must be a mapping, got {type(info).__name__}")
    return Reward(value=_number(returned), info=dict(info))


def read_last_line(output: str) -> Reward | None:
    r"""The reward in the last line of a program's output that is not empty; ``None`` if that line is something else.

    Raises:
        RunFailedError: the line is a number that is not finite.

    Examples:
        >>> read_last_line("the answer is 7\n0.5\n\n").value
        0.5
        >>> read_last_line('{"reward": 1, "info": {"right": true}}').info
        {'right': True}
        >>> read_last_line("the answer is 7") is None
        True
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines:
        return None
    try:
        return read_returned(float(lines[-1]))
    except ValueError:
        pass
    try:
        said = json.loads(lines[-1])
    except ValueError:
        return None
    return read_returned(said) if isinstance(said, dict) and "reward" in said else None


def _number(value: Any) -> float:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = type(value).__name__
        raise RunFailedError("bad reward", f"the agent returned {value!r:.80} ({kind}); it must be {_FORM}") from error
    if not math.isfinite(number):
        raise RunFailedError("bad reward", f"the reward is {number}; it must be a finite number")
    return number
