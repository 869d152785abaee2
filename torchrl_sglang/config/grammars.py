"""Grammars that constrain a response, as the text that SGLang takes.

SGLang's grammar backend runs in the scheduler process, so what is known to be invalid is refused before sending.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang.config.checking import require
from torchrl_sglang.config.sampling_values import pattern_text, text
from torchrl_sglang.errors import ConfigError

__all__ = ["GRAMMARS", "grammar_text"]

GRAMMARS = ("regex", "json_schema", "ebnf", "structural_tag")
_ANY_JSON = "$$ANY$$"
"""SGLang's name of the grammar of all JSON."""
_DEEPEST = 64
"""Levels of nesting: the backends' parsers are recursive, and their stack is not bounded by SGLang."""
_LONGEST = 1_000_000


def grammar_text(name: str, value: Any) -> str | None:
    """A grammar as text; ``None`` for none. JSON may be given as an object, a regular expression compiled.

    Raises:
        ConfigError: another type, invalid JSON, or too deeply nested.

    Examples:
        >>> grammar_text("json_schema", {"type": "integer"})
        '{"type": "integer"}'
    """
    if value is None or (isinstance(value, str) and not value):
        return None
    if name in ("json_schema", "structural_tag"):
        written = _json_text(name, value)
    else:
        written = pattern_text(name, value)
        _require_shallow(name, max(_depth(written, "(", ")"), _depth(written, "{", "}")))
    require("\0" not in written, f"{name} holds a NUL character, which SGLang's grammar backends can't take")
    require(len(written) <= _LONGEST, f"{name} has {len(written)} characters; at most {_LONGEST} are supported")
    return written


def _json_text(name: str, value: Any) -> str:
    if hasattr(value, "model_json_schema"):  # a pydantic model
        value = value.model_json_schema()
    if not isinstance(value, str):
        written = _write_json(name, value)
    else:
        written = text(name, value)
        if name == "json_schema" and written == _ANY_JSON:
            return written
    try:
        content = json.loads(written)
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON ({error}): {written[:200]!r}") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply") from None
    accepted = isinstance(content, dict) or (name == "json_schema" and isinstance(content, bool))
    require(accepted, f"{name} must be a JSON object, or its text, got {value!r:.200}")
    _require_shallow(name, _json_depth(name, content))
    return written


def _write_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} can't be written as JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply") from None


def _plain(value: Any) -> Any:
    """Other kinds of dictionaries and lists, such as OmegaConf's, and numbers of numpy, as Python's own."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r:.80} is a {type(value).__name__}")


def _json_depth(name: str, content: Any) -> int:
    """Levels of nesting. Also refuses NUL characters and lone surrogates in strings, which JSON may have escaped."""
    deepest, pending = 0, [(content, 1)]
    while pending and deepest <= _DEEPEST:
        node, depth = pending.pop()
        deepest = max(deepest, depth)
        if isinstance(node, str):
            text(name, node)
            require("\0" not in node, f"{name} holds a NUL character, which SGLang's grammar backends can't take")
        elif isinstance(node, Mapping):
            pending.extend((each, depth + 1) for pair in node.items() for each in pair)
        elif isinstance(node, (list, tuple)):
            pending.extend((each, depth + 1) for each in node)
    return deepest


def _depth(written: str, opening: str, closing: str) -> int:
    depth = deepest = 0
    for character in written:
        depth += (character == opening) - (character == closing)
        deepest = max(deepest, depth)
    return deepest


def _require_shallow(name: str, depth: int) -> None:
    require(depth <= _DEEPEST, f"{name} is nested more than {_DEEPEST} levels deep")
