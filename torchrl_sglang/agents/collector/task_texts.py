"""Tasks as text and as copies: what a program is given, what a batch shows, and what one run may change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, is_dataclass
from datetime import date, time
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

__all__ = ["own_copy", "task_as_json", "task_label"]


def task_as_json(task: Any) -> str:
    """A task as a program gets it: a string as it is, anything else as JSON.

    NumPy's and torch's values are numbers and lists; dataclasses, mappings and pydantic's models are objects.

    Raises:
        TypeError: it holds something that JSON has not.
        ValueError: it holds NaN or an infinity, or itself.

    Examples:
        >>> task_as_json("2 + 3"), task_as_json({"numbers": (1, 2), "file": PurePath("a.txt")})
        ('2 + 3', '{"numbers": [1, 2], "file": "a.txt"}')
    """
    return task if isinstance(task, str) else json.dumps(task, ensure_ascii=False, allow_nan=False, default=_plain)


def task_label(task: Any) -> str:
    """A task as text to find it again, whatever it holds."""
    try:
        return task_as_json(task)
    except (TypeError, ValueError):
        return str(task)


def own_copy(task: Any) -> Any:
    """A task that a run may change without changing those of other runs: its dicts, lists and sets are new.

    Examples:
        >>> task = {"messages": ["a"]}
        >>> own_copy(task)["messages"].append("b")
        >>> task
        {'messages': ['a']}
    """
    return _copied(task, {})


def _copied(task: Any, made: dict[int, Any]) -> Any:
    """A copy, in which what is there twice, or holds itself, is one object again."""
    kind = type(task)
    if id(task) in made:
        return made[id(task)]
    if kind is dict:
        items: dict[Any, Any] = {}
        made[id(task)] = items
        items.update((key, _copied(value, made)) for key, value in task.items())
        return items
    if kind is list:
        values: list[Any] = []
        made[id(task)] = values
        values.extend(_copied(value, made) for value in task)
        return values
    if kind is tuple:
        return tuple(_copied(value, made) for value in task)
    if kind is set:
        made[id(task)] = task.copy()
        return made[id(task)]
    return task


def _plain(value: Any) -> Any:
    """What JSON holds instead of a value that it does not know."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return dict(value.items()) if hasattr(value, "items") else value.to_dict()
    if isinstance(value, Set):
        return sorted(value, key=repr)
    if isinstance(value, (PurePath, UUID, date, time, Decimal)):
        return str(value)
    raise TypeError(f"a {type(value).__name__}, which JSON can't hold")
