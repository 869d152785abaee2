"""The file from which copies of a pool in other processes learn which servers are its members.

The original writes it at each change. A copy looks at its time stamp before each batch, which takes a microsecond. The
file is in this machine's folder for temporary files: copies on other machines don't see it, and keep the members that
they have.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["MemberFile"]


class MemberFile:
    """Written by one process, read by others of the same user. There is no file until something is written.

    Args:
        path: the file; ``None`` chooses a new name.

    Examples:
        >>> original = MemberFile()
        >>> copy = MemberFile(original.path)
        >>> copy.read_if_new() is None
        True
        >>> original.write(["http://a:30000"])
        >>> copy.read_if_new()
        ['http://a:30000']
        >>> copy.read_if_new() is None  # nothing has changed since
        True
        >>> original.delete()
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or Path(tempfile.gettempdir(), f"torchrl-sglang-members-{uuid.uuid4().hex}.json")
        self._seen: tuple[int, int] | None = None
        self._owner: weakref.finalize[..., object] | None = None

    def write(self, urls: Sequence[str]) -> None:
        """Replace the content; a reader sees either the old or the new one. The file is deleted with this object."""
        new = self.path.with_suffix(".new")
        with suppress(FileNotFoundError):
            new.unlink()
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
            json.dump(list(urls), file)
        new.replace(self.path)
        if self._owner is None:
            self._owner = weakref.finalize(self, _delete, self.path, os.getpid())

    def read_if_new(self) -> list[str] | None:
        """The members, if the file has changed since the last look; ``None`` if not, or if there is no file."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp == self._seen or status.st_uid != os.geteuid():
            return None
        try:
            urls = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        self._seen = stamp
        return [str(url) for url in urls]

    def delete(self) -> None:
        """Delete the file, if this object has written it."""
        if self._owner is not None:
            self._owner()
            self._owner = None


def _delete(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        with suppress(OSError):
            path.unlink()
