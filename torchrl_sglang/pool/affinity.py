"""Which server holds the prefix of a conversation, so that its next turn goes there.

A conversation is known by a key that its caller gives, or by its tokens: a prompt that begins with a prompt or with a
whole sequence of earlier is its continuation.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence

from torchrl_sglang.protocol.version import WeightVersion

__all__ = ["Affinity"]

_BLOCK = 16
"""Ends of sequences are rounded down to this many tokens: shorter prefixes are not worth a thought."""
_MAX_ENTRIES = 200_000
"""About 30 MB. The oldest are forgotten: a server's cache has forgotten them too."""


class Affinity:
    """Remembers on which server each conversation was generated last. Thread-safe.

    Examples:
        >>> affinity = Affinity()
        >>> first_turn = list(range(40))
        >>> affinity.note("http://a:30000", first_turn)
        >>> affinity.find([*first_turn, 7, 8, 9]), affinity.find([3, 4, 5] * 20)
        ('http://a:30000', None)
        >>> affinity.note("http://b:30000", [1, 2], key="session 5")
        >>> affinity.find([9, 9], key="session 5")
        'http://b:30000'
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: OrderedDict[Hashable, str] = OrderedDict()
        self._version = WeightVersion(number=0)

    def weights_are(self, version: WeightVersion) -> None:
        """Which weights the servers have: prefixes computed with others are worth nothing, so all are forgotten."""
        with self._lock:
            if version != self._version:
                self._version = version
                self._server.clear()

    def note(self, url: str, ids_T: Sequence[int], *, key: Hashable | None = None) -> None:
        """A sequence, or the prompt of one, is on a server.

        Args:
            url: the server.
            ids_T: its tokens.
            key: the conversation's, if it has one.
        """
        last = next(iter(deque(_ends(ids_T), maxlen=1)), None)
        with self._lock:
            for each in (last, None if key is None else ("key", key)):
                if each is not None:
                    self._server[each] = url
                    self._server.move_to_end(each)
            while len(self._server) > _MAX_ENTRIES:
                self._server.popitem(last=False)

    def find(self, ids_T: Sequence[int], *, key: Hashable | None = None) -> str | None:
        """The server with the longest known prefix of a prompt, or with the conversation of ``key``; else ``None``."""
        with self._lock:
            if key is not None and ("key", key) in self._server:
                return self._server["key", key]
            if not self._server:
                return None
        found = None
        for end in _ends(ids_T):
            found = self._server.get(end, found)
        return found


def _ends(ids_T: Sequence[int]) -> Iterator[int]:
    """A number for each prefix whose length is a multiple of the block, shortest first."""
    data = array("q", ids_T).tobytes()
    size = 8 * _BLOCK
    end = 0
    for start in range(0, len(data) - size + 1, size):
        end = hash((end, data[start : start + size]))
        yield end
