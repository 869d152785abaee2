"""Named shared memory that servers open by torch's own functions, kept from one sync to the next.

A segment is a file in ``/dev/shm`` in the form of torch's ``file_system`` sharing: a header with a counter of openings,
then the bytes. torch removes a file when the counter reaches zero. Here it starts so high that it never does, since the
:mod:`.keeper` process removes the files: also when the trainer is killed.
"""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchrl_sglang.errors import ConfigError, StorageError
from torchrl_sglang.weights.group.trainer_mark import TrainerMark
from torchrl_sglang.weights.shared_memory import keeper
from torchrl_sglang.weights.shared_memory.keeper import SHARED_MEMORY

__all__ = ["Segment", "SegmentPool", "remove_abandoned_segments"]

_PREFIX = "torchrl-"
"""torch allows 59 characters for a name."""
_HEADER_BYTES = 64
"""Before a segment's bytes; the first four are the counter of openings. Source: torch, ``MapAllocator.cpp``."""
_OPENINGS = 2**30
_PATIENCE_S = 60.0
"""How long a segment that nobody needs any more is kept for a server that was told to open it and has not done so."""
_END_TIMEOUT_S = 2.0
_LONGEST_SOCKET_PATH = 100
"""The kernel allows 107 bytes, and torch does not check that."""

_numbers = itertools.count()


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
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._manager = ""
        self._owner = ""
        self._segments: dict[int, Segment] = {}
        self._pid = os.getpid()

    @property
    def is_open(self) -> bool:
        """Whether the process runs that servers need to open segments."""
        return self._process is not None and self._process.poll() is None

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
        length = len(tempfile.gettempdir()) + len("/torchrl-sglang-12345678/shm.sock")
        if length > _LONGEST_SOCKET_PATH:
            raise ConfigError(
                f"the path of the folder for temporary files is too long for a socket in it: {tempfile.gettempdir()}. "
                "Set TMPDIR to a shorter one, which trainer and servers share, or use SyncConfig(transport='broadcast')"
            )
        remove_abandoned_segments()
        command = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), str(_PATIENCE_S)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd="/",
            start_new_session=True,
        )
        self._pid = os.getpid()
        self._owner = TrainerMark.of_process(self._process.pid).place
        assert self._process.stdout is not None
        self._manager = self._process.stdout.readline().strip()
        self._process.stdout.close()
        if not self._manager:
            self._process.wait()
            self._process = None
            raise ConfigError(
                f"the process that owns shared memory segments did not start ({' '.join(command)}): "
                "SyncConfig(transport='broadcast') needs none"
            )
        return self._manager

    def make(self, nbytes: int) -> torch.Tensor:
        """Make a segment and return its bytes: uint8, ``(nbytes,)``.

        Raises:
            StorageError: ``/dev/shm`` has no room for it.
        """
        manager = self.open()
        name = f"{_PREFIX}{self._owner}-{os.getpid()}.{next(_numbers)}"
        self._tell(f"idle {name}")
        path = SHARED_MEMORY / name
        _allocate(path, _HEADER_BYTES + nbytes)
        storage: Any = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=_HEADER_BYTES + nbytes)
        data = torch.empty(0, dtype=torch.uint8).set_(storage)[_HEADER_BYTES:]
        self._segments[_address(data)] = Segment(name, nbytes, manager, data)
        return data

    def of(self, flat: torch.Tensor) -> Segment:
        """The segment whose memory ``flat`` is the beginning of."""
        return self._segments[_address(flat)]

    def expect(self, segment: Segment, pids: Sequence[int]) -> None:
        """These processes will be told to open a segment: it is kept until they have closed it, or have ended."""
        self._tell(f"expect {segment.name} {' '.join(map(str, pids))}")

    def answered(self, segment: Segment) -> None:
        """Every server that was told to open a segment has answered."""
        self._tell(f"idle {segment.name}")

    def discard(self, data: torch.Tensor) -> None:
        """Remove the segment of this tensor as soon as no server is about to open it."""
        segment = self._segments.pop(_address(data), None)
        if segment is not None:
            self._tell(f"drop {segment.name}")

    def close(self) -> None:
        """Remove all segments. Those that a server is about to open are removed later, by the process."""
        segments, process = list(self._segments.values()), self._process
        self._segments, self._process = {}, None
        if process is None or self._pid != os.getpid():  # a forked child leaves its parent's alone
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        if process.poll() is not None:
            for segment in segments:
                (SHARED_MEMORY / segment.name).unlink(missing_ok=True)
            return
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # it waits for a server, and ends by itself
            process.returncode = 0  # nobody waits for it

    def _tell(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ConfigError(
                "the process that owns the shared memory segments was ended by somebody. The next sync starts another"
            ) from error


def _address(data: torch.Tensor) -> int:
    """Where the memory of a segment's tensor begins; also known for an empty part of it."""
    return data.untyped_storage().data_ptr()


def _allocate(path: Path, nbytes: int) -> None:
    """Make a file whose memory is there: writing to a sparse one would end the process when the memory runs out."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        os.pwrite(descriptor, struct.pack("i", _OPENINGS), 0)
    except OSError as error:
        path.unlink(missing_ok=True)
        room = os.statvfs(SHARED_MEMORY)
        raise StorageError(
            f"{SHARED_MEMORY} has no room for {nbytes / 1e6:.0f} MB of weights ({error.strerror}; "
            f"{room.f_bavail * room.f_frsize / 1e6:.0f} MB are free). Make it larger (in a container "
            "with `--shm-size`), lower SyncConfig.bucket_bytes, set SyncConfig(stage='off'), or use "
            "SyncConfig(transport='broadcast')"
        ) from error
    finally:
        os.close(descriptor)


def remove_abandoned_segments() -> list[str]:
    """Remove segments whose helper process was killed, as a batch system kills all of a job's; returns their names."""
    removed = []
    for path in SHARED_MEMORY.glob(f"{_PREFIX}*-*-*-*"):
        helper = TrainerMark.parse(f"-{path.name.removeprefix(_PREFIX)}".rpartition("-")[0])
        if helper.is_alive() is False:
            with suppress(OSError):  # another user's
                path.unlink()
            removed.append(path.name)
    return removed
