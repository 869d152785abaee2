"""Finds out whether a server's processes can open this process's shared memory: tested, never assumed from an address.

A server that is told to open a segment which it can't see ends. An address shows nothing: ``127.0.0.1`` may be a
forwarded port, and a server in a container has another ``/dev/shm``. So the kernel is asked:

1. Whose socket is at the other end of a connection to the server? Only a process in this network namespace, of this
   user and visible in this process namespace, can be found.
2. Is it SGLang? The processes below it must contain a scheduler; a tunnel or proxy has none.
3. Does each scheduler see our files? A random token, written to ``/dev/shm``, where the helper process's socket lies
   too, is read through the scheduler's own root folder (``/proc/PID/root``).
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from urllib.parse import urlsplit

from torchrl_sglang.weights.shared_memory.keeper import SHARED_MEMORY

__all__ = ["HostCheck", "ServerProcess", "check_same_host"]

_PROC = Path("/proc")
_OWN_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_ACCEPT_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 5.0
_POLL_S = 0.02
_ESTABLISHED = "01"
_SCHEDULER = "sglang::schedul"
"""Name of a scheduler's process, of which the kernel keeps 15 characters. Source: SGLang 0.5.20 to 0.5.23,
``configure_scheduler_process``."""
_TOKENIZER_WORKER = "sglang::tokeniz"


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A process of a server on this host.

    Attributes:
        pid: its id.
        started: when it was started, so that a later process of the same id is told apart.
    """

    pid: int
    started: str

    def is_alive(self) -> bool:
        """Whether it still runs; yes, where this process can't look."""
        try:
            fields = _stat(self.pid)
        except OSError:
            return True
        return fields is not None and fields[19] == self.started


@dataclass(frozen=True, slots=True)
class HostCheck:
    """Whether a server can open this process's shared memory.

    Attributes:
        schedulers: its scheduler processes (one per tensor-parallel rank), if it can.
        reason: why it can't; empty if it can.
        may_change: whether the same process may be found to share it later: it was too busy to be looked at.
    """

    schedulers: tuple[ServerProcess, ...] = ()
    reason: str = ""
    may_change: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether it can."""
        return bool(self.schedulers) and not self.reason

    def still_holds(self) -> bool:
        """Whether the processes that were checked still run."""
        return self.is_shared and all(process.is_alive() for process in self.schedulers)


def check_same_host(url: str) -> HostCheck:
    """Check the server at a base URL; takes some milliseconds, and sends it no request."""
    try:
        return _check(url)
    except OSError as error:
        if error.errno not in _OWN_LIMITS:
            raise
        return HostCheck(reason=f"this process could not look at it: {error.strerror} (ulimit -n)", may_change=True)


def _check(url: str) -> HostCheck:
    if not (_PROC / "self" / "fd").is_dir() or not SHARED_MEMORY.is_dir():
        return HostCheck(reason="this system has no /proc or no /dev/shm")
    try:
        owners = _owners_of_other_end(url)
    except OSError as error:
        _refuse_own_limits(error)
        return HostCheck(reason=f"no connection: {error.strerror or error}", may_change=True)
    if owners is None:
        return HostCheck(reason=f"it did not accept a connection within {_ACCEPT_TIMEOUT_S:g} s", may_change=True)
    if not owners:
        return HostCheck(
            reason="no process of this user here holds the other end of a connection to it: it is on another host, in "
            "a container, or another user's"
        )
    schedulers = sorted(_schedulers_below(owners))
    if not schedulers:
        names = ", ".join(f"{_name(pid)} ({pid})" for pid in sorted(owners))
        return HostCheck(
            reason=f"{names} answers at its address and has no SGLang scheduler below it: a tunnel or proxy"
        )
    try:
        with _token() as (path, token):
            reasons = [reason for pid in schedulers if (reason := _why_not_visible(pid, path, token))]
    except OSError as error:
        _refuse_own_limits(error)
        return HostCheck(reason=f"no file can be written to {SHARED_MEMORY} ({error.strerror})", may_change=True)
    if reasons:
        return HostCheck(reason=reasons[0])
    found = [ServerProcess(pid, fields[19]) for pid in schedulers if (fields := _stat(pid)) is not None]
    return HostCheck(
        schedulers=tuple(found), reason="" if len(found) == len(schedulers) else "its processes have ended"
    )


# ------------------------------------------------------------------ the process at the other end of a connection


def _owners_of_other_end(url: str) -> set[int] | None:
    """Processes of this user that hold the server's end of a new connection; ``None`` if it is not accepted."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname or "127.0.0.1", port), timeout=_CONNECT_TIMEOUT_S) as connection:
        ours, theirs = connection.getsockname()[:2], connection.getpeername()[:2]
        end = time.monotonic() + _ACCEPT_TIMEOUT_S
        while True:
            inode = _inode_of(local=theirs, remote=ours)
            if inode is None:  # this kernel does not have the other end: it is another network namespace or host
                return set()
            if inode != "0":
                return _holders(f"socket:[{inode}]")
            if time.monotonic() > end:
                return None
            time.sleep(_POLL_S)


def _inode_of(*, local: tuple[str, int], remote: tuple[str, int]) -> str | None:
    wanted = (_address(*local), _address(*remote))
    for table in ("tcp", "tcp6"):
        try:
            lines = (_PROC / "net" / table).read_text().splitlines()[1:]
        except OSError as error:
            _refuse_own_limits(error)
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _ESTABLISHED and (_parsed(fields[1]), _parsed(fields[2])) == wanted:
                return fields[9]
    return None


def _address(host: str, port: int) -> tuple[str, int]:
    address = ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address), port


def _parsed(field: str) -> tuple[str, int]:
    """An address of ``/proc/net/tcp``: words of 32 bits in the machine's byte order, then the port."""
    digits, port = field.split(":")
    words = [int(digits[start : start + 8], 16) for start in range(0, len(digits), 8)]
    host = socket.inet_ntop(
        socket.AF_INET6 if len(words) == 4 else socket.AF_INET, struct.pack(f"={len(words)}I", *words)
    )
    return _address(host, int(port, 16))


def _holders(link: str) -> set[int]:
    return {pid for pid in _pids() if any(each == link for each in _open_files(pid))}


def _open_files(pid: int) -> Iterator[str]:
    """What the descriptors of a process refer to; nothing for a process of another user."""
    with _passed_over():
        for descriptor in (_PROC / str(pid) / "fd").iterdir():
            with _passed_over():  # closed meanwhile
                yield str(descriptor.readlink())


# ------------------------------------------------------------------ its schedulers


def _schedulers_below(owners: set[int]) -> set[int]:
    parents = {pid: int(fields[1]) for pid in _pids() if (fields := _stat(pid)) is not None}
    roots = {parents.get(pid, pid) if _name(pid) == _TOKENIZER_WORKER else pid for pid in owners}
    return {pid for pid in parents if _is_scheduler(pid) and _has_ancestor(pid, roots, parents)}


def _has_ancestor(pid: int, roots: set[int], parents: dict[int, int]) -> bool:
    while pid > 1 and pid not in roots:
        pid = parents.get(pid, 0)
    return pid in roots


def _is_scheduler(pid: int) -> bool:
    """Whether one of its threads has a scheduler's name, which they inherit from the first."""
    try:
        return any(_comm(task) == _SCHEDULER for task in (_PROC / str(pid) / "task").iterdir())
    except OSError as error:
        _refuse_own_limits(error)
        return False


# ------------------------------------------------------------------ what a scheduler sees


@contextmanager
def _token() -> Iterator[tuple[Path, bytes]]:
    """A file in shared memory and the random token in it, for the time of the block."""
    path = SHARED_MEMORY / f"torchrl-sglang-token-{os.getpid()}-{secrets.token_hex(4)}"
    token = secrets.token_bytes(16)
    try:
        path.write_bytes(token)
        yield path, token
    finally:
        with suppress(OSError):  # where it could not be written either
            path.unlink()


def _why_not_visible(pid: int, path: Path, token: bytes) -> str:
    try:
        seen = (_PROC / str(pid) / "root" / path.relative_to("/")).read_bytes()
    except FileNotFoundError:
        return f"its scheduler (process {pid}) has another {path.parent}: it, or this process, runs in a container"
    except OSError as error:
        _refuse_own_limits(error)
        return f"its scheduler (process {pid}) can't be looked at ({error.strerror}): it may be another user's"
    if seen != token:
        return f"its scheduler (process {pid}) has another {path.parent}"
    user = _user(pid)
    if user not in (os.geteuid(), 0):
        return f"its scheduler (process {pid}) runs as user {user}, who can't open this user's memory"
    return ""


# ------------------------------------------------------------------ this process's own limits


def _refuse_own_limits(error: OSError) -> None:
    """Raise an error that says nothing of the file that was to be opened, but of this process."""
    if error.errno in _OWN_LIMITS:
        raise error


@contextmanager
def _passed_over() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _refuse_own_limits(error)


# ------------------------------------------------------------------ /proc


def _pids() -> list[int]:
    return [int(folder.name) for folder in _PROC.iterdir() if folder.name.isdigit()]


def _stat(pid: int) -> list[str] | None:
    """Fields of a process's ``stat`` from its state on; ``None`` if it has ended."""
    try:
        # "pid (name) state ppid ...": the name may contain spaces and brackets.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        _refuse_own_limits(error)
        return None
    return None if fields[0] in ("Z", "X") else fields


def _comm(folder: Path) -> str:
    try:
        return (folder / "comm").read_text().strip()
    except OSError as error:
        _refuse_own_limits(error)
        return ""


def _name(pid: int) -> str:
    return _comm(_PROC / str(pid))


def _user(pid: int) -> int | None:
    """The user that a process opens files as."""
    try:
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("Uid:"):
                return int(line.split()[4])
    except OSError as error:
        _refuse_own_limits(error)
    return None
