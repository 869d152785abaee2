"""Checks with which settings verify their own fields."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torchrl_sglang.errors import ConfigError

__all__ = [
    "as_path",
    "names_checked",
    "nearest_name",
    "require",
    "require_number",
    "require_numbers",
    "require_positive",
    "words",
]

_LONGEST_S = 1e9
"""Python's waits and time-outs overflow at about nine times this."""

Record = TypeVar("Record", bound=type)


def names_checked(hint: Callable[[str, Sequence[str]], str] | None = None) -> Callable[[Record], Record]:
    """Class decorator: the constructor of a keyword-only dataclass refuses unknown names with a :class:`ConfigError`.

    Python's own ``TypeError`` suggests no name.

    Args:
        hint: ``hint(name, known names)`` ends the message; :func:`nearest_name` by default.
    """

    def decorate(record: Record) -> Record:
        checked = record.__init__  # type: ignore[misc]
        known = [field.name for field in dataclasses.fields(record) if field.init]

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


def require_number(
    name: str,
    value: object,
    *,
    whole: bool = False,
    optional: bool = False,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Check one number, such as a constructor's argument.

    Args:
        name: what the message calls it. If it ends in ``_s``, but not in ``per_s``, it is a time: at most 30 years,
            beyond which the system's clocks overflow.
        value: what was given. Booleans, strings, NaN and infinity are no numbers.
        whole: it must be an integer.
        optional: ``None`` is allowed.
        above: it must be larger.
        at_least: it must be as large or larger.
        below: it must be smaller.
        at_most: it must be as small or smaller.

    Raises:
        ConfigError: naming the argument, what it must be, and what was given.

    Examples:
        >>> require_number("timeout_s", 5, above=0)
        >>> require_number("timeout_s", float("nan"), above=0)
        Traceback (most recent call last):
            ...
        torchrl_sglang.errors.ConfigError: timeout_s must be positive, got nan
        >>> require_number("keep", 1.5, whole=True, at_least=1)
        Traceback (most recent call last):
            ...
        torchrl_sglang.errors.ConfigError: keep must be an integer and at least 1, got 1.5
    """
    if value is None and optional:
        return
    if at_most is None and name.endswith("_s") and not name.endswith("per_s"):
        at_most = _LONGEST_S
    number: Any = value
    is_number = _is_number(value, whole)
    fits = (
        is_number
        and (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (below is None or number < below)
        and (at_most is None or number <= at_most)
    )
    if fits:
        return
    limits = ["positive" if above == 0 else f"above {above}"] if above is not None else []
    limits += [f"at least {at_least}"] if at_least is not None else []
    limits += [f"below {below}"] if below is not None else []
    limits += [f"at most {at_most:g}"] if at_most is not None and (at_most != _LONGEST_S or is_number) else []
    what = ["an integer"] if whole and not is_number else ["a finite number"] if not limits else []
    raise ConfigError(f"{name} must be {' and '.join(what + limits)}, got {value!r}")


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        return False
    try:
        return whole or math.isfinite(float(value))
    except OverflowError:  # 10**400
        return False


def require_numbers(config: Any, *names: str, **limits: float) -> None:
    """Check fields of a settings record with :func:`require_number`, which has the ``limits``.

    A field that is annotated ``int`` must be whole, and ``None`` is allowed where the annotation has it. NumPy's
    numbers become Python's, which JSON can hold.

    Args:
        config: a dataclass, whose fields these are.
        names: the fields.
        **limits: ``above``, ``at_least``, ``below``, ``at_most``.

    Raises:
        ConfigError: as :func:`require_number`.
    """
    annotations = {field.name: str(field.type) for field in dataclasses.fields(config)}
    for name in names:
        value, annotation = getattr(config, name), annotations[name]
        whole, optional = annotation.startswith("int"), "None" in annotation
        require_number(name, value, whole=whole, optional=optional, **limits)
        if value is not None and not isinstance(value, (int, float)):
            object.__setattr__(config, name, int(value) if whole else float(value))


def require_positive(config: Any, *names: str, zero: bool = False) -> None:
    """Check attributes of any object: positive numbers (or 0, with ``zero``). ``None`` is allowed.

    Raises:
        ConfigError: as :func:`require_number`.
    """
    for name in names:
        value = getattr(config, name)
        require_number(name, value, optional=True, above=None if zero else 0, at_least=0 if zero else None)


def words(name: str, value: Sequence[str]) -> tuple[str, ...]:
    """A sequence of strings as a tuple. Refuses a plain string, which Python treats as a sequence of its letters."""
    require(not isinstance(value, str), f"{name} must be a sequence of strings, got the string {value!r}")
    is_sequence = isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping))
    require(is_sequence, f"{name} must be a sequence of strings, got {value!r}")
    return tuple(str(word) for word in value)


def as_path(name: str, value: object) -> Path:
    """A path that is given as a string or a path object.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(value, (str, Path)):
        raise ConfigError(f"{name} must be a path, got {value!r}")
    return Path(value)
