"""Checks with which settings verify their own fields."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from torchrl_sglang.errors import ConfigError

__all__ = ["names_checked", "nearest_name", "require", "require_positive", "words"]

Record = TypeVar("Record", bound=type)


def names_checked(hint: Callable[[str, Sequence[str]], str] | None = None) -> Callable[[Record], Record]:
    """Class decorator: the constructor of a keyword-only dataclass refuses unknown names with a :class:`ConfigError`.

    Python's own ``TypeError`` suggests no name.

    Args:
        hint: ``hint(name, known names)`` ends the message; :func:`nearest_name` by default.
    """

    def decorate(record: Record) -> Record:
        checked = record.__init__  # type: ignore[misc]
        known = [field.name for field in fields(record) if field.init]

        @functools.wraps(checked)
        def __init__(self: Any, *args: Any, **given: Any) -> None:
            for name in given:
                if name not in known:
                    raise ConfigError(
                        f"{record.__name__} has no argument {name!r}.{(hint or nearest_name)(name, known)}"
                    )
            checked(self, *args, **given)

        record.__init__ = __init__  # type: ignore[misc]
        return record

    return decorate


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
