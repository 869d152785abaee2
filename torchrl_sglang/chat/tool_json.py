"""JSON as models write it: strict where the meaning would be doubtful, with every number's own spelling kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["JsonNumber", "plain", "read_json", "read_json_at", "spelling"]


class JsonNumber(float):
    """A number with a point or an exponent, as it was written: a version ``1.10`` is not ``1.1``.

    Examples:
        >>> JsonNumber("1.10").text
        '1.10'
    """

    text: str

    def __new__(cls, text: str) -> JsonNumber:
        """A number from its spelling; raises ``ValueError`` if it is too large for a float."""
        number = super().__new__(cls, text)
        if number in (float("inf"), float("-inf")):
            raise ValueError(f"the number {text} is too large")
        number.text = text
        return number


def _members(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return members


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


_FIRST_CHARACTERS = frozenset('{["-0123456789tfnNI')

# Not strict: models write line breaks and tabs into strings as they are, and their meaning is plain.
_DECODER = json.JSONDecoder(
    strict=False, parse_float=JsonNumber, parse_constant=_refuse_constant, object_pairs_hook=_members
)


def read_json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at ``start``, and where it ends.

    Raises:
        ValueError: no JSON value begins there, a key is given twice, or it holds text that can't be encoded.
    """
    if text[start : start + 1] not in _FIRST_CHARACTERS:  # quicker than the decoder's error, which counts lines
        raise ValueError(f"not JSON at {text[start : start + 30]!r}")
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}) at {text[error.pos : error.pos + 30]!r}") from None
    try:
        text[start:end].encode()
        if "\\u" in text[start:end]:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string holds half of a surrogate pair") from None
    return value, end


def read_json(text: str) -> Any:
    r"""The JSON value that is the whole text.

    Raises:
        ValueError: the text is something else, see :func:`read_json_at`.

    Examples:
        >>> read_json('{"a": "one\ntwo"}')
        {'a': 'one\ntwo'}
        >>> read_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: the key 'a' is given twice
    """
    body = text.strip()
    value, end = read_json_at(body, 0)
    if end != len(body):
        raise ValueError(f"there is more text after the JSON value: {body[end : end + 40]!r}")
    return value


def plain(value: Any) -> Any:
    """The value with ordinary floats."""
    if isinstance(value, JsonNumber):
        return float(value)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def spelling(value: Any) -> str:
    """How a number, a truth value or null was written.

    Examples:
        >>> spelling(read_json("1.10")), spelling(True)
        ('1.10', 'true')
    """
    return value.text if isinstance(value, JsonNumber) else json.dumps(value)
