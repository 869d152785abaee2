"""The mark that an update leaves on a server: whose it is, and in which process its trainer runs.

It is the owner part of the dirty version: ``dirty-13@a1b2c3d4.2-5f0e1d2c-4711-998877`` is the second group of trainer
``a1b2c3d4``, in process 4711 of a certain host. So a trainer on the same host can tell whether the other one is alive.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torchrl_sglang.forks import ForkSafeLock

__all__ = ["TrainerMark", "update_under_way"]

_lock = ForkSafeLock()
_under_way: set[TrainerMark] = set()


@dataclass(frozen=True, slots=True)
class TrainerMark:
    """Who updates a server.

    Attributes:
        group: names the process groups of the update: the trainer's id and a count.
        host: id of host and process namespace; empty in a mark that another program wrote.
        pid: process id there.
        started: when that process was started, so that a later process of the same id is told apart.

    Examples:
        >>> mark = TrainerMark.parse("a1b2c3d4.2-5f0e1d2c-4711-998877")
        >>> mark.owner, mark.group, mark.pid
        ('a1b2c3d4', 'a1b2c3d4.2', 4711)
        >>> TrainerMark.parse("another").is_alive() is None
        True
    """

    group: str
    host: str = ""
    pid: int = 0
    started: int = 0

    @classmethod
    def own(cls, group: str) -> TrainerMark:
        """The mark of an update by this process."""
        pid = os.getpid()
        return cls(group, _host(), pid, _started(pid) or 0)

    @classmethod
    def of_process(cls, pid: int, group: str = "") -> TrainerMark:
        """The mark of another process of this host."""
        return cls(group, _host(), pid, _started(pid) or 0)

    @classmethod
    def parse(cls, text: str) -> TrainerMark:
        """Read the owner part of a dirty version."""
        group, *rest = text.split("-")
        if len(rest) != 3 or not (rest[1].isdigit() and rest[2].isdigit()):
            return cls(text)
        return cls(group, rest[0], int(rest[1]), int(rest[2]))

    def __str__(self) -> str:
        return f"{self.group}-{self.place}" if self.host else self.group

    @property
    def place(self) -> str:
        """Host and process, without the group."""
        return f"{self.host}-{self.pid}-{self.started}"

    @property
    def owner(self) -> str:
        """The trainer's id."""
        return self.group.partition(".")[0]

    def is_alive(self) -> bool | None:
        """Whether the update is under way: ``None`` if it can't be told from here, because it is on another host."""
        if self.host != _host():
            return None
        if self.pid == os.getpid():
            with _lock:
                return self in _under_way
        started = _started(self.pid)
        return started is not None and started == self.started


@contextmanager
def update_under_way(mark: TrainerMark) -> Iterator[None]:
    """Let other updates of this process know of this one."""
    with _lock:
        _under_way.add(mark)
    try:
        yield
    finally:
        with _lock:
            _under_way.discard(mark)


@cache
def _host() -> str:
    words = [socket.gethostname()]
    with suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        words.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]


def _started(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; ``None`` if it has ended, 0 without ``/proc``."""
    try:
        # "pid (name) state ppid ...": the name may contain spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else int(fields[19])
    except OSError:
        if Path("/proc/self").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return 0
    return 0
