"""``Fields``: reads a JSON object field by field, each with its type; a field that nobody reads is refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang.agents.http.api_errors import bad_request

__all__ = ["Fields"]

_KINDS = {str: "a string", bool: "true or false", dict: "an object", list: "a list"}


class Fields:
    """The fields of one JSON object. ``null`` counts as absent, as in OpenAI's API.

    Args:
        value: the parsed JSON.
        where: path of the object in the request, such as ``messages[0]``; empty for the request itself.

    Raises:
        ApiError: ``value`` is not an object.

    Examples:
        >>> fields = Fields({"temperature": 0.5, "temprature": 1})
        >>> fields.number("temperature")
        0.5
        >>> fields.refuse_unread()
        Traceback (most recent call last):
        ...
        torchrl_sglang.agents.http.api_errors.ApiError: unknown field 'temprature'. Did you mean 'temperature'?
    """

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, (dict, Mapping)):  # the first is found at once
            raise bad_request(f"{where or 'the body'} must be a JSON object, got {value!r:.100}", where or None)
        self._value = value
        self.where = where
        self._known: set[str] = set()

    def path(self, name: str) -> str:
        """The field's path in the request."""
        return f"{self.where}.{name}" if self.where else name

    def all(self) -> dict[str, Any]:
        """All fields, as they are."""
        self._known.update(self._value)
        return dict(self._value)

    def given(self, names: Sequence[str]) -> list[str]:
        """Those of the names that have a value; all of them count as read."""
        self._known.update(names)
        return [name for name in names if self._value.get(name) is not None]

    def any(self, name: str) -> Any:
        """A field of any type; ``None`` if it is absent."""
        self._known.add(name)
        return self._value.get(name)

    def text(self, name: str, *, choices: Sequence[str] = (), required: bool = False) -> str | None:
        """A string."""
        value = self._typed(name, str, required)
        if value is not None and choices and value not in choices:
            known = ", ".join(map(repr, choices))
            raise bad_request(f"{self.path(name)} must be one of {known}; got {value!r:.100}", self.path(name))
        return None if value is None else str(value)

    def required_text(self, name: str) -> str:
        """A string that must be there."""
        return str(self.text(name, required=True))

    def flag(self, name: str) -> bool | None:
        """A boolean."""
        value = self._typed(name, bool, False)
        return None if value is None else bool(value)

    def object(self, name: str, *, required: bool = False) -> dict[str, Any] | None:
        """An object."""
        value: dict[str, Any] | None = self._typed(name, dict, required)
        return value

    def list(self, name: str, *, required: bool = False) -> list[Any] | None:
        """A list."""
        value: list[Any] | None = self._typed(name, list, required)
        return value

    def number(self, name: str) -> float | None:
        """A finite number."""
        value = self.any(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            raise bad_request(f"{self.path(name)} must be a number, got {value!r:.100}", self.path(name))
        return value

    def integer(self, name: str, *, at_least: int | None = None, at_most: int | None = None) -> int | None:
        """A whole number, which some clients write as ``8.0``."""
        value = self.number(name)
        if value is None:
            return None
        if value != int(value):
            raise bad_request(f"{self.path(name)} must be a whole number, got {value!r}", self.path(name))
        if (at_least is not None and value < at_least) or (at_most is not None and value > at_most):
            bounds = f"at least {at_least}" if at_most is None else f"between {at_least} and {at_most}"
            bounds = bounds if at_least is not None else f"at most {at_most}"
            raise bad_request(f"{self.path(name)} must be {bounds}, got {value!r}", self.path(name))
        return int(value)

    def ignore(self, *names: str) -> None:
        """Fields that do not change the answer."""
        self._known.update(names)

    def refuse(self, name: str, why: str, *, neutral: Sequence[Any] = ()) -> None:
        """Refuse a field of the API that can't be honoured, unless its value asks for nothing.

        Args:
            name: the field.
            why: what to do instead.
            neutral: values that ask for nothing, besides ``null`` and empty lists and objects.

        Raises:
            ApiError: the field asks for something.
        """
        value = self.any(name)
        if (
            value is None
            or value in ([], {})
            or any(value is n or (value == n and type(value) is type(n)) for n in neutral)
        ):
            return
        raise bad_request(
            f"{self.path(name)}={value!r:.80} can't be honoured: {why}", self.path(name), "unsupported_parameter"
        )

    def refuse_unread(self) -> None:
        """Refuse the fields that nobody has read.

        Raises:
            ApiError: there is one; the message names the nearest known one.
        """
        for name, value in self._value.items():
            if name not in self._known and value is not None:
                close = difflib.get_close_matches(name, sorted(self._known), n=1)
                hint = f" Did you mean {close[0]!r}?" if close else " It would have no effect: remove it."
                raise bad_request(f"unknown field {self.path(name)!r}.{hint}", self.path(name), "unknown_parameter")

    def _typed(self, name: str, kind: type, required: bool) -> Any:
        value = self.any(name)
        if value is None and required:
            raise bad_request(f"{self.path(name)} is missing", self.path(name), "missing_required_parameter")
        if value is not None and not isinstance(value, kind):
            raise bad_request(f"{self.path(name)} must be {_KINDS[kind]}, got {value!r:.100}", self.path(name))
        return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False
