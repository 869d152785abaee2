"""``SameCalls``: whether a call that a client sends back, with defaults filled in, is the one that was sampled."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_sglang.agents.conversation.messages import Call

__all__ = ["SameCalls", "call_key", "plain_numbers", "same_but_defaults"]

_DEEPEST = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class SameCalls:
    """Compares a client's calls with those that were sampled.

    Attributes:
        schemas: of the arguments of each tool.
        by_id: whether a call that has the id of a sampled one is that one, whatever became of its arguments.
    """

    schemas: Mapping[str, Any] = field(default_factory=dict)
    by_id: bool = False

    def same(self, client: Call, recorded: Call) -> bool:
        """Whether they are one call."""
        if client.key == recorded.key:
            return True
        if client.name != recorded.name:
            return False
        if self.by_id and client.id and client.id == recorded.id:
            return True
        given, sampled = client.arguments, recorded.arguments
        if isinstance(given, str) or isinstance(sampled, str):
            return False
        return same_but_defaults(plain_numbers(given), plain_numbers(sampled), self.schemas.get(client.name))


def call_key(name: str, arguments: Mapping[str, Any] | str) -> tuple[str, str]:
    """Equal for calls that are the same, whatever the spelling of their arguments."""
    if isinstance(arguments, str):
        return name, unicodedata.normalize("NFC", arguments.strip())
    written = json.dumps(plain_numbers(arguments), sort_keys=True, ensure_ascii=False)
    return name, unicodedata.normalize("NFC", written)


def plain_numbers(value: Any) -> Any:
    """The value with 1 for 1.0, as JavaScript writes it."""
    if isinstance(value, Mapping):
        return {str(key): plain_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_numbers(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(value)
    return value


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
