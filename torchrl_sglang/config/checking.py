"""Checks with which settings verify their own fields."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from torchrl_sglang.errors import ConfigError

__all__ = ["nearest_name", "require", "require_positive", "words"]


def nearest_name(name: str, known: Sequence[str]) -> str:
    """The hint `` Did you mean 'x'?`` with the closest of ``known``; an empty string when none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(config: object, *names: str, zero: bool = False) -> None:
    """Raise :class:`ConfigError` unless each field is ``None`` or a finite number above 0 (or 0, with ``zero``)."""
    for name in names:
        value = getattr(config, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        require(
            value is None or (is_number and (value > 0 or (zero and value == 0))),
            f"{name} must be {'at least 0' if zero else 'positive'}, got {value!r}",
        )


def words(name: str, value: Sequence[str]) -> tuple[str, ...]:
    """A sequence of strings as a tuple. Refuses a plain string, which Python treats as a sequence of its letters."""
    require(not isinstance(value, str), f"{name} must be a sequence of strings, got the string {value!r}")
    return tuple(str(word) for word in value)
