"""What trainers write down: asked prompts, answers, syncs and waits, one JSON object a line.

A line counts when its end is there: a trainer that is killed in the middle of one has not written it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Journal", "read_journals"]


class Journal:
    """The file of one trainer's life. Thread-safe.

    Args:
        path: a new file.

    Attributes:
        lock: held while something is written; whoever holds it keeps all writers waiting.
    """

    def __init__(self, path: Path) -> None:
        self.lock = threading.RLock()
        self._file = path.open("x")

    def write(self, kind: str, **record: Any) -> None:
        """Append one record; it survives the death of this process."""
        line = json.dumps({"kind": kind, **record})
        with self.lock:
            self._file.write(line + "\n")
            self._file.flush()


def read_journals(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of all trainers, life by life."""
    for path in sorted(folder.glob("journal-*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line) | {"life": path.stem}
