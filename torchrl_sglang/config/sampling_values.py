"""Sampling values as the types that SGLang's scheduler decodes.

SGLang's HTTP front passes most values on unchecked, and its scheduler process ends on a value of another type. A value
that has one meaning is converted (numbers of numpy and torch, ids in an array or a set); any other is refused.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torchrl_sglang.config.checking import require
from torchrl_sglang.errors import ConfigError

__all__ = [
    "flag",
    "flat_params",
    "integer",
    "logit_bias",
    "number",
    "one_or_more",
    "pattern_text",
    "text",
    "token_id",
    "token_ids",
]

INT32_MAX = 2**31 - 1
_INT64 = range(-(2**63), 2**63)
_MOST_BIAS = 1e6
"""Larger biases overflow when the logits are divided by a small temperature."""
_RESERVED_PREFIX = "__sglang_"


def _scalar(value: Any) -> Any:
    """A number of numpy or torch as a Python one; everything else as it is."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def integer(name: str, value: Any) -> int:
    """An int, from Python, numpy or torch.

    Raises:
        ConfigError: a boolean, a float, or anything else.
    """
    value = _scalar(value)
    require(not isinstance(value, bool), f"{name} must be an int, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be an int, got {value!r}") from None


def number(name: str, value: Any) -> float:
    """A finite number, from Python, numpy or torch; an int stays one.

    Raises:
        ConfigError: a boolean, NaN, infinity, or anything else.
    """
    value = _scalar(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An int beyond the floats' range makes math.isfinite raise.
    require(
        is_number and abs(value) < 2**1023 and math.isfinite(value), f"{name} must be a finite number, got {value!r}"
    )
    return int(value) if isinstance(value, int) else float(value)


def flag(name: str, value: Any) -> bool:
    """A boolean, from Python, numpy or torch.

    Raises:
        ConfigError: anything else, 0 and 1 included.
    """
    value = _scalar(value)
    require(isinstance(value, bool), f"{name} must be True or False, got {value!r}")
    return bool(value)


def text(name: str, value: Any) -> str:
    """A string that UTF-8 can encode.

    Raises:
        ConfigError: another type, or a lone surrogate.
    """
    require(isinstance(value, str), f"{name} must be a string, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} holds half of a surrogate pair, which is no character: {value!r}") from None
    return str(value)


def pattern_text(name: str, value: Any) -> str:
    """The text of a regular expression, which may be compiled.

    Raises:
        ConfigError: another type, or compiled with flags, which the text does not have.
    """
    if isinstance(value, re.Pattern):
        flags = value.flags & ~re.UNICODE
        require(not flags, f"{name} was compiled with flags, and only its text can be sent: got {value!r}")
        value = value.pattern
    return text(name, value)


def one_or_more(name: str, value: Any, what: str) -> list[Any]:
    """The elements of a sequence, set or array; one string or number is one element, ``None`` is none.

    Raises:
        ConfigError: neither.
    """
    value = _scalar(value)
    if value is None:
        return []
    if isinstance(value, (str, int, float)):
        return [value]
    if hasattr(value, "tolist"):
        value = value.tolist()
    require(
        isinstance(value, Iterable) and not isinstance(value, (Mapping, bytes)), f"{name} must be {what}, got {value!r}"
    )
    return list(value)


def token_id(name: str, value: Any) -> int:
    """A token id: an int of at least 0.

    Raises:
        ConfigError: anything else.
    """
    number_ = integer(name, value)
    require(0 <= number_ <= INT32_MAX, f"{name} must be token ids of at least 0, got {value!r}")
    return number_


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One or several token ids.

    Raises:
        ConfigError: something that is no token id.
    """
    given = one_or_more(name, value, "token ids")
    for each in given:
        require(
            not isinstance(_scalar(each), (bool, str, float)) and each is not None,
            f"{name} must be token ids, got {value!r}",
        )
    return tuple(token_id(name, each) for each in given)


def logit_bias(value: Any) -> dict[str, float] | None:
    """Biases by token id, ids as strings of digits. Minus infinity becomes the largest negative bias: never sampled.

    Raises:
        ConfigError: a key that is no token id, two biases for one token, or a value that is no bounded number.

    Examples:
        >>> logit_bias({5: 1, "6": float("-inf")})
        {'5': 1, '6': -1000000.0}
    """
    if value is None:
        return None
    require(isinstance(value, Mapping), f"logit_bias must map token ids to numbers, got {value!r}")
    biases: dict[str, float] = {}
    for key, bias in value.items():
        if isinstance(key, str):
            require(key.isascii() and key.isdigit(), f"logit_bias has the key {key!r}, which is no token id")
            key = int(key)
        token = str(token_id("the keys of logit_bias", key))
        require(token not in biases, f"logit_bias has two values for token {token}")
        if _scalar(bias) == -math.inf:
            bias = -_MOST_BIAS
        biases[token] = number(f"logit_bias[{token}]", bias)
        require(
            abs(biases[token]) <= _MOST_BIAS,
            f"logit_bias[{token}] must be between -{_MOST_BIAS:g} and {_MOST_BIAS:g}, got {bias!r}",
        )
    return biases or None


def flat_params(value: Any) -> dict[str, Any] | None:
    """``custom_params``: scalars, lists of scalars, and one level of dictionaries of scalars.

    Raises:
        ConfigError: deeper nesting (SGLang's scheduler ends on it), a name that SGLang reserves, or another type.
    """
    if value is None:
        return None
    require(isinstance(value, Mapping), f"custom_params must be a mapping, got {value!r}")
    params: dict[str, Any] = {}
    for key, entry in value.items():
        name = text("the keys of custom_params", key)
        require(
            not name.startswith(_RESERVED_PREFIX), f"custom_params[{name!r}]: SGLang reserves names with this prefix"
        )
        where = f"custom_params[{name!r}]"
        entry = entry.tolist() if hasattr(entry, "tolist") else entry
        if isinstance(entry, Mapping):
            params[name] = {text(where, inner): _json_scalar(where, each) for inner, each in entry.items()}
        elif isinstance(entry, Sequence) and not isinstance(entry, (str, bytes)):
            params[name] = [_json_scalar(where, each) for each in entry]
        else:
            params[name] = _json_scalar(where, entry)
    return params or None


def _json_scalar(where: str, value: Any) -> Any:
    value = _scalar(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(where, value)
    if isinstance(value, int):
        require(value in _INT64, f"{where} must fit into 64 bits, got {value}")
        return int(value)
    if isinstance(value, float):
        return number(where, value)
    raise ConfigError(
        f"{where} holds {value!r}: SGLang takes None, booleans, numbers and strings, and one level of lists or "
        "dictionaries of them"
    )
