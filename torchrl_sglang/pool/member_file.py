"""The file from which copies of a pool in other processes learn which servers are its members, and how to talk to them.

The original writes it at each change. A copy looks at its time stamp before each batch, which takes a microsecond. The
file is in this machine's folder for temporary files: copies on other machines don't see it, and keep the members that
they have. Like a pickled pool, it holds the servers' keys; only its owner can read it.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import uuid
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from torchrl_sglang.config import ClientConfig

__all__ = ["MemberFile"]

_PREFIX = "torchrl-sglang-members-"
_NEW = ".new"


class MemberFile:
    """Written by one process, read by others of the same user. There is no file until something is written.

    Args:
        path: the file; ``None`` chooses a new name.
        common: settings that copies have without the file: those of the server that the pool was made with first.

    Attributes:
        joins: per URL how often the server has joined, as last read; 0 for those that the pool was made with. Of one
            that left and joined again between two looks nothing else shows it.

    Examples:
        >>> original = MemberFile()
        >>> copy = MemberFile(original.path)
        >>> copy.read_if_new() is None
        True
        >>> original.write({"http://a:30000": None, "http://b:30000": ClientConfig(api_key="b")})
        >>> members = copy.read_if_new()
        >>> members["http://a:30000"], members["http://b:30000"].api_key
        (None, 'b')
        >>> copy.read_if_new() is None  # nothing has changed since
        True
        >>> original.delete()
    """

    def __init__(self, path: Path | None = None, common: ClientConfig | None = None) -> None:
        if path is None:
            _delete_abandoned(Path(tempfile.gettempdir()))
        self.path = path or Path(tempfile.gettempdir(), f"{_PREFIX}{uuid.uuid4().hex}.json")
        self.common = common
        self.joins: dict[str, int] = {}
        self._seen: tuple[int, int, int] | None = None
        self._owner: weakref.finalize[..., object] | None = None
        self._held: list[int] = []

    def write(
        self, members: Mapping[str, ClientConfig | None], joins: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """Replace the content; a reader sees either the old or the new one. The file is deleted with this object.

        Args:
            members: per URL the settings of its client; ``None`` for the common ones, which are left out.
            joins: per URL how often it has joined, where that is not 0.

        As long as this process lives, it holds a lock on the file: those of processes that were killed are deleted.
        """
        new = self.path.with_suffix(f".{os.getpid()}{_NEW}")
        with suppress(FileNotFoundError):
            new.unlink()
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with ExitStack() as on_failure:
            on_failure.callback(os.close, descriptor)
            on_failure.callback(new.unlink, missing_ok=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entries = {
                url: {
                    "client": None if config is None or config == self.common else asdict(config),
                    "joins": joins.get(url, 0),
                }
                for url, config in members.items()
            }
            content = json.dumps(entries).encode()
            while content:  # a disk that becomes full takes a part of it, and raises at the next
                content = content[os.write(descriptor, content) :]
            new.replace(self.path)
            on_failure.pop_all()
        held, self._held = self._held, [descriptor]
        if self._owner is not None:
            self._owner.detach()
        self._owner = weakref.finalize(self, _delete, self.path, os.getpid(), self._held)
        _close(held)

    def read_if_new(self) -> dict[str, ClientConfig | None] | None:
        """The members as written, if the file has changed since the last look; ``None`` if not, or if there is none."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp == self._seen or status.st_uid != os.geteuid():
            return None
        try:
            entries = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        self._seen = stamp
        self.joins = {url: entry["joins"] for url, entry in entries.items()}
        settings = {url: entry["client"] for url, entry in entries.items()}
        return {url: self.common if fields is None else ClientConfig(**fields) for url, fields in settings.items()}

    def read_again(self) -> None:
        """Take the content for new at the next look, also if it is not."""
        self._seen = None

    def delete(self) -> None:
        """Delete the file, if this object has written it."""
        if self._owner is not None:
            self._owner()
            self._owner = None


def _delete(path: Path, pid: int, held: list[int]) -> None:
    if os.getpid() == pid:
        with suppress(OSError):
            path.unlink()
    _close(held)  # in a forked child the lock stays that of its parent


def _close(held: list[int]) -> None:
    while held:
        os.close(held.pop())


def _delete_abandoned(folder: Path) -> None:
    """Delete the files on which nobody holds a lock: their writers were killed, perhaps while they wrote."""
    for path in [*folder.glob(f"{_PREFIX}*.json"), *folder.glob(f"{_PREFIX}*{_NEW}")]:
        with suppress(OSError, ValueError, IndexError):  # another user's, or deleted meanwhile, or in use
            if not path.is_file():  # opening somebody's pipe would wait for ever
                continue
            if path.suffix == _NEW and _is_running(int(path.suffixes[-2][1:])):  # its writer may not have locked it yet
                continue
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A living writer may have replaced the file since it was opened, which frees the lock of the old one.
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
