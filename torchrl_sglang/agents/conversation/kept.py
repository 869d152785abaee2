"""``Kept``: results that are asked for again, up to a total size; ``value_key``: a key for them."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import orjson

__all__ = ["Kept", "value_key"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Values by key; those that were not asked for longest are forgotten. May be used from several threads.

    Args:
        most: largest sum of the sizes.

    Examples:
        >>> kept: Kept[str, int] = Kept(10)
        >>> kept.put("a", 1, size=6), kept.put("b", 2, size=6), kept.get("a"), kept.get("b")
        (None, None, None, 2)
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.size = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The value; ``None`` if there is none."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: K, value: V, *, size: int) -> None:
        """Keep a value; one that is larger than all may be together is not kept."""
        if size > self._most:
            return
        with self._lock:
            if key not in self._values:
                self._values[key] = (value, size)
                self.size += size
            while self.size > self._most:
                self.size -= self._values.popitem(last=False)[1][1]


def value_key(value: Any) -> bytes:
    """Equal for JSON values that are written alike: the order of fields counts, as templates and grammars write them.

    Examples:
        >>> value_key({"a": 1, "b": 2}) == value_key({"b": 2, "a": 1})
        False
    """
    try:
        return orjson.dumps(value)
    except TypeError:  # keys that are no texts, integers of more than 64 bits, half of a surrogate pair
        return json.dumps(value, default=repr).encode()
