"""Arguments of a call as clients send them back after they have checked them: defaults filled in, or left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["same_but_defaults"]

_DEEPEST = 50


def same_but_defaults(client: Any, recorded: Any, schema: Any, *, depth: int = 0) -> bool:
    """Whether two values are the same but for defaults of a schema, which one of them has and the other lacks.

    Args:
        client: arguments, or a value in them, as a client sent them back.
        recorded: the same as they were sampled.
        schema: their JSON schema; anything else has no defaults.
        depth: number of values around them.

    Examples:
        >>> schema = {"properties": {"all": {"type": "boolean", "default": False}}}
        >>> same_but_defaults({"path": "a", "all": False}, {"path": "a"}, schema)
        True
        >>> same_but_defaults({"path": "a", "all": True}, {"path": "a"}, schema)
        False
    """
    known: Mapping[str, Any] = schema if isinstance(schema, Mapping) else {}
    if depth > _DEEPEST:
        return False
    if isinstance(client, Mapping) and isinstance(recorded, Mapping):
        inner = known.get("properties")
        of = inner if isinstance(inner, Mapping) else {}
        return all(
            same_but_defaults(client[name], recorded[name], of.get(name), depth=depth + 1)
            if name in client and name in recorded
            else _is_default(client[name] if name in client else recorded[name], of.get(name))
            for name in client.keys() | recorded.keys()
        )
    if isinstance(client, list) and isinstance(recorded, list):
        items = known.get("items")
        return len(client) == len(recorded) and all(
            same_but_defaults(one, other, items, depth=depth + 1) for one, other in zip(client, recorded, strict=True)
        )
    return _is_equal(client, recorded)


def _is_default(value: Any, schema: Any) -> bool:
    """Whether it makes no difference that an argument is left out."""
    if not isinstance(schema, Mapping):
        return False
    return _is_equal(value, schema["default"]) if "default" in schema else value is None


def _is_equal(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
