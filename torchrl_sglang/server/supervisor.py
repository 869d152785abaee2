"""The small process between the owner and a server: starts the server, writes its log, kills its tree at the end.

The end is that of the server or of the owner. The supervisor runs by path with ``python -I -S`` and uses the standard
library only, so that it starts in milliseconds and loads nothing of the trainer. It reads its order as JSON from stdin
(the order may hold keys, and a command line can be read by everyone)::

    {"owner_pid": 1234, "command": ["python", "-m", ...], "log_path": "...", "secrets": ["..."],
     "secret_file": {"path": "...yaml", "content": "..."}}

It writes the server's pid to stdout, and later exits with the server's exit code (128 + signal when killed).

The kernel's parent-death signal alone is not enough: it fires when the *thread* that launched the server ends, and
reaches only the direct child. The supervisor sees the owner's death by its changed parent pid, even if other processes
inherited the owner's pipes. And as a "subreaper" it stays the ancestor of every process that the server starts: it
finds them all below itself, and leaves no zombie.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

__all__ = ["ProcessRow", "kill_tree", "process_row", "process_table", "rotated_path", "tree_pids"]

_OWNER_POLL_S = 0.5
_MAX_LOG_BYTES = 64 << 20
"""A server that logs each request writes some 10 MB an hour: with the rotated file, the last day or so is kept."""
_MAX_LINE_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class ProcessRow(NamedTuple):
    """One line of the process table: parent pid, session id, state letter (``Z`` is a zombie)."""

    parent: int
    session: int
    state: str


def process_row(pid: int) -> ProcessRow | None:
    """One process as ``/proc`` shows it; ``None`` when there is no such process."""
    try:
        stat = Path("/proc", str(pid), "stat").read_bytes()
    except OSError:
        return None
    # The name is in parentheses and may itself hold spaces and parentheses.
    state, parent, _group, session = stat.rpartition(b")")[2].split()[:4]
    return ProcessRow(int(parent), int(session), state.decode())


def process_table() -> dict[int, ProcessRow]:
    """Every process of this machine that ``/proc`` shows, by pid."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208
    rows = ((pid, process_row(pid)) for pid in pids)
    return {pid: row for pid, row in rows if row is not None}  # without those that ended meanwhile


def tree_pids(root: int) -> set[int]:
    """Living descendants of ``root`` and members of its session, without ``root``."""
    table = process_table()
    members = {pid for pid, row in table.items() if row.session == root}
    grew = True
    while grew:
        children = {pid for pid, row in table.items() if row.parent == root or row.parent in members}
        grew = not children <= members
        members |= children
    return {pid for pid in members if pid != root and table[pid].state != "Z"}


def kill_tree(root: int, timeout_s: float = 10.0) -> bool:
    """Send SIGKILL to all processes below ``root`` until none is left; ``False`` if one is left at the deadline.

    Repeats, because a process may start another one between listing and killing.
    """
    deadline = time.monotonic() + timeout_s
    while pids := tree_pids(root):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class RotatedLog:
    """A log file that never fails its writer and has a bounded size.

    At ``max_bytes`` it becomes ``NAME.1``, which replaces an older one, and a new file begins. What cannot be written
    (a full disk) is counted and left out; a line says so once the file can be written again.

    Args:
        path: the file; appended to.
        max_bytes: size at which it is rotated, in bytes.
    """

    def __init__(self, path: Path, max_bytes: int = _MAX_LOG_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._lost_bytes = 0
        self._why = ""

    def write(self, text: bytes) -> None:
        """Append ``text``, or count it as lost."""
        try:
            if self._path.exists() and self._path.stat().st_size + len(text) > self._max_bytes:
                self._path.replace(rotated_path(self._path))
            note = f"[{self._lost_bytes} bytes of output were lost: {self._why}]\n" if self._lost_bytes else ""
            with open(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:  # noqa: PTH123
                file.write(note.encode() + text)
        except OSError as error:
            self._lost_bytes += len(text)
            self._why = error.strerror or str(error)
        else:
            self._lost_bytes = 0


def rotated_path(path: Path) -> Path:
    """Where the older part of a log is."""
    return path.with_name(f"{path.name}.1")


def copy_log(source: BinaryIO, target: RotatedLog, secrets: list[bytes]) -> None:
    """Copy line by line until all writers have closed, with every secret replaced by ``***``.

    SGLang prints its whole configuration at its start, keys included. A carriage return ends a line too: progress bars
    use it. A line without an end is cut after :data:`_MAX_LINE_BYTES`.
    """
    rest = b""
    while chunk := source.read1(65536):  # type: ignore[attr-defined]
        rest += chunk
        end = max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1
        if not end and len(rest) > _MAX_LINE_BYTES:
            end = len(rest)
        if end:
            target.write(_redact(rest[:end], secrets))
            rest = rest[end:]
    if rest:
        target.write(_redact(rest, secrets))


def _redact(text: bytes, secrets: list[bytes]) -> bytes:
    for secret in secrets:
        text = text.replace(secret, b"***")
    return text


def _reap_adopted(timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.01)


def _announce_end(server: subprocess.Popen[bytes], ended: threading.Event) -> None:
    server.wait()
    ended.set()


def _supervise(order: dict[str, Any], prctl: Callable[..., int]) -> int:
    owner_pid = order["owner_pid"]
    if os.getppid() != owner_pid:  # the owner died before this process started
        return 1
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Until there is a server to pass SIGTERM on to, SIGTERM ends this process, as it should.
    server = subprocess.Popen(
        order["command"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # If this process is killed with SIGKILL, the server dies too, and SGLang's own processes die with the server.
        preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    print(server.pid, flush=True)
    sys.stdout.close()

    assert server.stdout is not None
    secrets = [secret.encode() for secret in order["secrets"]]
    log = RotatedLog(Path(order["log_path"]))
    copier = threading.Thread(target=copy_log, args=(server.stdout, log, secrets), daemon=True)
    copier.start()
    ended = threading.Event()
    threading.Thread(target=_announce_end, args=(server, ended), daemon=True).start()
    while not ended.wait(_OWNER_POLL_S) and os.getppid() == owner_pid:
        pass
    kill_tree(os.getpid())
    ended.wait(5)
    _reap_adopted()
    copier.join(5)
    code = server.returncode if server.returncode is not None else -signal.SIGKILL
    return code if code >= 0 else 128 - code


def _main() -> int:
    order = json.load(sys.stdin)
    secret_file = order.get("secret_file")
    if secret_file is None:
        return _supervise(order, ctypes.CDLL(None).prctl)
    path = secret_file["path"]
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
        file.write(secret_file["content"])
    try:
        return _supervise(order, ctypes.CDLL(None).prctl)
    finally:
        Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(_main())
