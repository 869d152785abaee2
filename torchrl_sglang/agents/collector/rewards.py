"""The reward of one run of an agent: what a function returned, or the last line that a program printed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchrl_sglang.agents.collector.failures import RunFailedError
from torchrl_sglang.agents.given_values import as_json_object, as_reward
from torchrl_sglang.errors import ConfigError

__all__ = ["NoReward", "Reward", "last_line", "read_last_line", "read_returned"]

_WORDS = {"true": True, "false": False}
"""What Python and JavaScript print of a comparison."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE | re.ASCII)
_STYLE = re.compile(r"\x1b\[[0-9;:?]*[A-Za-z]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)|\x1b[()][A-Z0-9]|\r")
"""What terminals read as colours, positions and titles."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class NoReward:
    """That a run returned none; it may have been posted.

    Attributes:
        hint: what was found instead.
    """

    hint: str = ""


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
    info: Any = None
    if isinstance(returned, Mapping):
        unknown = sorted(map(str, set(returned) - {"reward", "info"}))
        if "reward" not in returned or unknown:
            what = f"unknown fields {unknown}" if unknown else "no field 'reward'"
            raise RunFailedError("bad reward", f"the agent returned a mapping with {what}; it must be {_FORM}")
        returned, info = returned["reward"], returned.get("info")
    return _reward(returned, info)


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
    line = last_line(output)
    if line.lower() in _WORDS:
        return read_returned(_WORDS[line.lower()])
    if _NUMBER.fullmatch(line):
        return read_returned(float(line))
    try:
        said = json.loads(line)
    except ValueError:
        return None
    return read_returned(said) if isinstance(said, dict) and "reward" in said else None


def last_line(output: str) -> str:
    r"""The last line that shows something in a terminal, without its colours; ``""`` if there is none.

    Examples:
        >>> last_line("7\n\x1b[32m0.5\x1b[0m\n\x1b[0m\n")
        '0.5'
    """
    lines = _STYLE.sub("", output.replace("\r\n", "\n")).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _reward(value: Any, info: Any) -> Reward:
    try:
        return Reward(value=as_reward(value), info=as_json_object("info", info))
    except ConfigError as error:
        raise RunFailedError("bad reward", f"{error}. The agent must return {_FORM}") from error
