"""Regular expressions that end a response: SGLang's scheduler searches for them with Python's ``re``."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from torchrl_sglang.config.checking import require
from torchrl_sglang.config.sampling_values import pattern_text
from torchrl_sglang.errors import ConfigError

__all__ = ["stop_pattern"]

_MOST_STOP_REGEX_BYTES = 256  # SGLang's limit
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
_MOST_REPEATS = 16
# What `re` itself parses with, as SGLang does. Its former name is deprecated from Python 3.11 on.
_parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


def stop_pattern(value: Any) -> str:
    """A regular expression that ends a response: SGLang searches for it with Python's ``re`` after every token.

    Raises:
        ConfigError: not a non-empty string, not valid, or too long for SGLang.
    """
    pattern = pattern_text("stop_regex", value)
    require(bool(pattern), "stop_regex must be non-empty strings")
    length = len(pattern.encode())
    require(
        length <= _MOST_STOP_REGEX_BYTES,
        f"stop_regex has {length} bytes, and SGLang takes at most {_MOST_STOP_REGEX_BYTES}: {pattern[:80]!r}...",
    )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"stop_regex {pattern!r} is not a valid regular expression: {error}") from None
    if _backtracks_forever(_parser.parse(pattern)):
        raise ConfigError(
            f"stop_regex {pattern!r} repeats a repetition: Python's re may need exponential time for it, and SGLang's "
            "scheduler would hang until its watchdog ends it. Write it with one repetition"
        )
    return pattern


def _backtracks_forever(tree: Any) -> bool:
    """Whether a repetition's body can consist of a repetition alone, as in ``(a+)+`` or ``(a+b*)*``."""
    for operator, argument in tree:
        if str(operator) in _REPEATS and argument[1] > _MOST_REPEATS:
            for sequence in _alternatives(argument[2]):
                repeated = [i for i, item in enumerate(sequence) if _is_repetition(item)]
                widths = [_least_width(argument[2], item) for item in sequence]
                if any(not any(widths[:i] + widths[i + 1 :]) for i in repeated):
                    return True
        if any(_backtracks_forever(inner) for inner in _subpatterns(argument)):
            return True
    return False


def _alternatives(tree: Any) -> list[list[Any]]:
    """The sequences of items that a group's body may be, without groups around a single item."""
    items = list(tree)
    if len(items) == 1:
        operator, argument = items[0]
        if str(operator) == "SUBPATTERN":
            return _alternatives(argument[-1])
        if str(operator) == "BRANCH":
            return [sequence for branch in argument[1] for sequence in _alternatives(branch)]
    return [items]


def _is_repetition(item: Any) -> bool:
    operator, argument = item
    if str(operator) == "SUBPATTERN":
        return any(map(_is_repetition, _single_items(argument[-1])))
    if str(operator) not in _REPEATS:
        return False
    return argument[1] > _MOST_REPEATS or any(map(_is_repetition, _single_items(argument[2])))


def _single_items(tree: Any) -> list[Any]:
    return [sequence[0] for sequence in _alternatives(tree) if len(sequence) == 1]


def _least_width(tree: Any, item: Any) -> int:
    return int(type(tree)(tree.state, [item]).getwidth()[0])


def _subpatterns(argument: Any) -> list[Any]:
    if isinstance(argument, (list, tuple)):
        return [found for each in argument for found in _subpatterns(each)]
    return [argument] if hasattr(argument, "getwidth") else []
