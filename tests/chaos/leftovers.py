"""What a run has left behind on the machine: processes, ports, files, shared-memory segments."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil

__all__ = ["Leftovers"]

_SHARED_MEMORY = Path("/dev/shm")
_PATIENCE_S = 10.0


class Leftovers:
    """Remembers the beginning; :meth:`find` looks at the end.

    Args:
        mark: ``NAME=VALUE`` in the environment of every process of the run.
        temporary: the run's folder for temporary files.
    """

    def __init__(self, mark: str, temporary: Path) -> None:
        self._mark = mark.split("=")
        self._temporary = temporary
        self._segments_before = set(_segments())

    def find(self, urls: Sequence[str], pids: Sequence[int]) -> list[str]:
        """Everything left after a moment.

        Args:
            urls: addresses at which nothing must listen.
            pids: processes of the run that have ended. Names of shared-memory segments hold those of their makers:
                others may work on this machine.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while (found := self._find(urls, pids)) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def _find(self, urls: Sequence[str], pids: Sequence[int]) -> list[str]:
        found = [f"process {process.pid}: {' '.join(process.cmdline())[:120]}" for process in self._processes()]
        found += [f"port of {url}" for url in urls if _listens(url)]
        files = [path for path in sorted(self._temporary.rglob("*")) if not path.is_dir()]
        found += [f"file {path}" for path in files if path not in self._of_sglang()]
        return found + [f"shared memory {name}" for name in sorted(self._segments_left(pids))]

    def _of_sglang(self) -> set[Path]:
        """The names of its sockets: SGLang (0.5.23) makes eight a start, and never removes them."""
        return {path for path in self._temporary.glob("tmp????????") if path.is_socket() or path.stat().st_size == 0}

    def num_sockets(self) -> int:
        """How many empty files SGLang itself has left."""
        return len(self._of_sglang())

    def _processes(self) -> Iterable[psutil.Process]:
        own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        name, value = self._mark
        for process in psutil.process_iter():
            try:
                # The tracker of semaphores, which tqdm makes, ends with this process.
                is_tracker = process.ppid() in own and "resource_tracker" in " ".join(process.cmdline())
                if process.pid not in own and process.environ().get(name) == value and not is_tracker:
                    yield process
            except psutil.Error:  # it has just ended, or is somebody else's
                continue

    def _segments_left(self, pids: Sequence[int]) -> set[str]:
        new = set(_segments()) - self._segments_before
        return {name for name in new if {str(pid) for pid in pids} & set(re.split(r"[^0-9]+", name))}


def _segments() -> list[str]:
    return os.listdir(_SHARED_MEMORY) if _SHARED_MEMORY.exists() else []  # noqa: PTH208


def _listens(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((parts.hostname or "", parts.port or 0)) == 0
