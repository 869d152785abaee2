"""Named shared memory that servers open by torch's own functions, kept from one sync to the next.

A segment is a file in ``/dev/shm`` in the form of torch's ``file_system`` sharing: a header with a counter of openings,
then the bytes. torch removes a file when the counter reaches zero. Here it starts so high that it never does, since the
:mod:`.keeper` process removes the files: also when the trainer is killed.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchrl_sglang.errors import ConfigError, StorageError
from torchrl_sglang.weights.group.trainer_mark import TrainerMark
from torchrl_sglang.weights.shared_memory import keeper
from torchrl_sglang.weights.shared_memory.keeper import FOLDER_PREFIX, SHARED_MEMORY, SOCKET_NAME
from torchrl_sglang.weights.shared_memory.room import available_bytes

__all__ = ["Segment", "SegmentPool", "remove_abandoned_segments"]

_PREFIX = "torchrl-"
"""torch allows 59 characters for a name."""
_HEADER_BYTES = 64
"""Before a segment's bytes; the first four are the counter of openings. Source: torch, ``MapAllocator.cpp``."""
_OPENINGS = 2**30
_PATIENCE_S = 60.0
"""How long a segment that nobody needs any more is kept for a server that was told to open it and has not done so."""
_END_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = 5.0
"""How long the process may take to answer before it counts as stopped. A server that asks it waits 1 s."""
_MESSAGE = struct.pack("=i?60s", 0, False, b"")
"""As a server announces that it opens a segment; see :mod:`.keeper`."""

_numbers = itertools.count()
_of_lost_processes: list[socket.socket] = []


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment.

    Attributes:
        name: file name in ``/dev/shm``.
        nbytes: size of its data.
        manager: path of the socket that servers use while they have it open.
        data: its bytes: uint8, ``(nbytes,)``.
    """

    name: str
    nbytes: int
    manager: str
    data: torch.Tensor


class SegmentPool:
    """The segments of one transport and the process that removes them. It is started with the first segment.

    Segments are only made here; a :class:`~torchrl_sglang.weights.buckets.packing.BucketPacker` keeps and reuses their
    tensors, and so bounds their number and size. A segment stays until :meth:`discard` or :meth:`close`.

    Args:
        may_lack_room: where there is no room for a segment, give memory of this process, and say so.

    Attributes:
        no_room: why :meth:`make` has given memory that servers can't open; empty if it has not.
    """

    def __init__(self, *, may_lack_room: bool = False) -> None:
        self.no_room = ""
        self._may_lack_room = may_lack_room
        self._process: subprocess.Popen[str] | None = None
        self._connections: socket.socket | None = None  # holds the servers' connections to the process; never read
        self._manager = ""
        self._owner = ""
        self._segments: dict[int, Segment] = {}
        self._about_to_be_opened: set[str] = set()
        self._pid = os.getpid()

    @property
    def is_open(self) -> bool:
        """Whether the process that servers need to open segments runs and answers."""
        return self._process is not None and self._process.poll() is None and _answers(self._manager)

    @property
    def names(self) -> list[str]:
        """Names of all segments."""
        return [segment.name for segment in self._segments.values()]

    def open(self) -> str:
        """Start the process, unless it runs; returns the path of its socket.

        Raises:
            ConfigError: this machine can't do it.
        """
        if self.is_open:
            return self._manager
        self.close()
        remove_abandoned_segments()
        command = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), str(_PATIENCE_S)]
        with ExitStack() as stack:
            try:
                ours, theirs = map(stack.enter_context, socket.socketpair())
                process = _start([*command, str(theirs.fileno())], theirs)
            except OSError as error:
                raise _not_started(command, str(error)) from error
            assert process.stdout is not None
            with process.stdout:
                answer = process.stdout.readline().strip()
            if not answer.startswith("/"):
                process.wait()
                raise _not_started(command, answer)
            self._connections = ours.dup()
        self._process, self._manager, self._pid = process, answer, os.getpid()
        self._owner = TrainerMark.of_process(process.pid).place
        return answer

    def make(self, nbytes: int) -> torch.Tensor:
        """Make a segment and return its bytes: uint8, ``(nbytes,)``.

        Raises:
            StorageError: ``/dev/shm`` has no room for it.
        """
        try:
            if not self.no_room:
                return self._make(nbytes)
        except StorageError as error:
            if not self._may_lack_room:
                raise
            self.no_room = str(error)
        return torch.empty(nbytes, dtype=torch.uint8)

    def _make(self, nbytes: int) -> torch.Tensor:
        manager = self._manager if self._process is not None else self.open()
        name = f"{_PREFIX}{self._owner}-{os.getpid()}.{next(_numbers)}"
        self._tell(f"idle {name}")
        storage = _allocate(SHARED_MEMORY / name, _HEADER_BYTES + nbytes)
        data = torch.empty(0, dtype=torch.uint8).set_(storage)[_HEADER_BYTES:]
        self._segments[_address(data)] = Segment(name, nbytes, manager, data)
        return data

    def of(self, flat: torch.Tensor) -> Segment:
        """The segment whose memory ``flat`` is the beginning of.

        Raises:
            StorageError: :meth:`make` had no room for it, and gave memory that servers can't open.
        """
        segment = self._segments.get(_address(flat))
        if segment is None:
            raise StorageError(self.no_room)
        return segment

    def expect(self, segment: Segment, pids: Sequence[int]) -> None:
        """These processes will be told to open a segment: it is kept until they have closed it, or have ended.

        Raises:
            ConfigError: the process that they ask does not answer, and they would end. They must not be told.
        """
        if not _answers(self._manager):
            raise _ended()
        self._about_to_be_opened.add(segment.name)
        self._tell(f"expect {segment.name} {' '.join(map(str, pids))}")

    def answered(self, segment: Segment) -> None:
        """Every server that was told to open a segment has answered."""
        self._about_to_be_opened.discard(segment.name)
        self._tell(f"idle {segment.name}")

    def discard(self, data: torch.Tensor) -> None:
        """Remove the segment of this tensor as soon as no server is about to open it."""
        segment = self._segments.pop(_address(data), None)
        if segment is not None:
            if segment.name not in self._about_to_be_opened:
                _remove(segment)  # at once, not when the process gets to it
            self._tell(f"drop {segment.name}")

    def close(self) -> None:
        """Remove all segments. Those that a server is about to open are removed later, by the process."""
        segments, process = list(self._segments.values()), self._process
        self._segments, self._process, self.no_room = {}, None, ""
        needed, self._about_to_be_opened = self._about_to_be_opened, set()
        connections, self._connections = self._connections, None
        if process is None or self._pid != os.getpid():  # a forked child leaves its parent's alone
            return
        self._end(process, segments, needed)
        if connections is not None and needed and process.returncode != 0:
            _of_lost_processes.append(connections)  # a server may still have a segment open
        elif connections is not None:
            connections.close()

    def _end(self, process: subprocess.Popen[str], segments: Sequence[Segment], needed: Collection[str]) -> None:
        assert process.stdin is not None
        for segment in segments:
            if segment.name not in needed:
                _remove(segment)
        with suppress(OSError):
            process.stdin.write("end\n")  # a child that was forked meanwhile has the pipe open
            process.stdin.flush()
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            if _answers(self._manager):
                process.returncode = 0  # it waits for a server, and ends by itself: nobody waits for it
                return
            process.kill()  # it was stopped, and no server can open anything
            process.wait()
        for segment in segments:
            _remove(segment)
        _remove_folder(Path(self._manager).parent)

    def _tell(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise _ended() from error


def _start(command: Sequence[str], shared: socket.socket) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd="/",
        start_new_session=True,
        pass_fds=(shared.fileno(),),
    )


def _not_started(command: Sequence[str], why: str) -> ConfigError:
    return ConfigError(
        f"the process that owns shared memory segments did not start{f' ({why})' if why else ''}: {' '.join(command)}. "
        "SyncConfig(transport='broadcast') needs none"
    )


def _ended() -> ConfigError:
    return ConfigError(
        "the process that owns the shared memory segments was ended or stopped by somebody. The next sync starts "
        "another"
    )


def _remove(segment: Segment) -> None:
    (SHARED_MEMORY / segment.name).unlink(missing_ok=True)


def _answers(manager: str) -> bool:
    """Whether the process of a socket answers as a server that opens a segment needs it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_TIMEOUT_S)
        try:
            connection.connect(manager)
            connection.sendall(_MESSAGE)
            return connection.recv(2) == b"OK"
        except OSError:
            return False


def _address(data: torch.Tensor) -> int:
    """Where the memory of a segment's tensor begins; also known for an empty part of it."""
    return data.untyped_storage().data_ptr()


def _allocate(path: Path, nbytes: int) -> Any:
    """Make a file whose memory is there: writing to a sparse one would end the process when the memory runs out.

    Returns:
        Its storage.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            os.pwrite(descriptor, struct.pack("i", _OPENINGS), 0)
        finally:
            os.close(descriptor)
        return torch.UntypedStorage.from_file(str(path), shared=True, nbytes=nbytes)
    except (OSError, RuntimeError) as error:  # torch raises the latter
        with suppress(OSError):
            path.unlink()
        why = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"{SHARED_MEMORY} has no room for {nbytes / 1e6:.0f} MB of weights ({why}; "
            f"{available_bytes([SHARED_MEMORY]) / 1e6:.0f} MB are free). Make it larger (in a container "
            "with `--shm-size`), lower SyncConfig.bucket_bytes, set SyncConfig(stage='off'), or use "
            "SyncConfig(transport='broadcast')"
        ) from error


def remove_abandoned_segments() -> list[str]:
    """Remove segments whose helper process was killed, as a batch system kills all of a job's; returns their names.

    The folders of such processes' sockets go too.
    """
    removed = []
    for path in SHARED_MEMORY.glob(f"{_PREFIX}*-*-*-*"):
        helper = TrainerMark.parse(f"-{path.name.removeprefix(_PREFIX)}".rpartition("-")[0])
        if helper.is_alive() is False:
            with suppress(OSError):  # another user's
                path.unlink()
            removed.append(path.name)
    for path in SHARED_MEMORY.glob(f"{FOLDER_PREFIX}*/{SOCKET_NAME}"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.setblocking(False)
            if connection.connect_ex(str(path)) == errno.ECONNREFUSED:
                _remove_folder(path.parent)
    return removed


def _remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # another user's stays
