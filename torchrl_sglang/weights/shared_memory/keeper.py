"""A helper process of the trainer: removes its shared memory segments when nobody can open them any more.

Run as a script (``python keeper.py PID SECONDS``), with the standard library alone, so that it starts in 20 ms. It does
two things:

* Servers open a segment with torch's ``rebuild_storage_filename``, which tells a manager over a Unix socket that it is
  about to open a file, waits up to 1 s for its ``OK``, and later tells it that it has closed the file. This process
  answers. A server whose manager does not answer ends, so the manager must outlive a trainer that is killed.
* It removes a segment when the trainer says so or has ended, in whatever way, but not while a server is still going
  to open it or has it open: a server ends if the file is gone. After the given seconds nobody is waited for any more;
  after 10 if the trainer has ended, which may have been before it sent the request.

The trainer writes lines to its standard input: ``expect NAME PID...`` before it sends requests that make these
processes open a segment, ``idle NAME`` when all these requests are answered, ``drop NAME`` to have it removed, ``end``
to have all removed. The end of the input, or of the trainer's process, is an ``end`` too; a child that the trainer has
forked keeps the input open. The process ends when nothing is left to do.

The socket lies in ``/dev/shm`` beside the segments: who can open these can reach it, whatever its ``TMPDIR`` is.

Source of the socket's protocol: torch's ``libshm``. A message is a C struct ``{int pid; char free; char name[60];}``.
"""

from __future__ import annotations

import os
import resource
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
FOLDER_PREFIX = "torchrl-sglang-"
SOCKET_NAME = "shm.sock"
_FREE_OFFSET = 4
_NAME_OFFSET = 5
_POLL_S = 0.2
_PATIENCE_WITHOUT_TRAINER_S = 10.0
"""A server takes the request after the one that it is working on, and that holds a segment open meanwhile."""


class _Client:
    """A connection of one server process: how many files it has open, and bytes of an incomplete message."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.num_open = 0
        self._received = b""
        self._message_bytes = 0

    def read(self) -> list[tuple[int, bool, str]]:
        """Messages that have come, as ``(pid, whether a file was closed, its name)``.

        Raises:
            EOFError: the server has closed the connection.
        """
        data = self.connection.recv(65536)
        if not data:
            raise EOFError
        self._received += data
        # The first message comes alone, since its sender waits for the answer: its size is that of the struct.
        self._message_bytes = self._message_bytes or len(self._received)
        messages = []
        while len(self._received) >= self._message_bytes:
            message, self._received = self._received[: self._message_bytes], self._received[self._message_bytes :]
            name = message[_NAME_OFFSET:].split(b"\0")[0].decode("ascii", "replace").lstrip("/")
            messages.append((int.from_bytes(message[:_FREE_OFFSET], sys.byteorder), message[_FREE_OFFSET] != 0, name))
        return messages


class Keeper:
    """The state of the helper process.

    Args:
        trainer: pid of the trainer.
        patience_s: how long a segment that is to be removed waits for servers that have not opened it yet.
    """

    def __init__(self, trainer: int, patience_s: float) -> None:
        self._patience_s = patience_s
        self._expected: dict[str, list[int]] = {}  # per segment the processes that are going to open it
        self._dropped: dict[str, float] = {}
        self._clients: dict[int, _Client] = {}
        self._commands = b""
        self._has_ended = False
        self._selector = selectors.DefaultSelector()
        self._folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=SHARED_MEMORY)
        self.path = f"{self._folder}/{SOCKET_NAME}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{self.path}.new")
        self._listener.listen(256)
        Path(f"{self.path}.new").rename(self.path)  # under its name it always answers, or its process has ended
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, self._read_commands)
        self._trainer = trainer
        self._process: int | None = None
        try:
            self._process = os.pidfd_open(trainer)
            self._selector.register(self._process, selectors.EVENT_READ, self._trainer_ended)
        except OSError:  # it has ended, or this kernel is older than 5.3: run() looks from time to time
            pass

    def run(self) -> None:
        """Work until the trainer needs no more, and no server has a segment open."""
        try:
            while not self._is_done():
                is_waiting = self._dropped or self._has_ended or self._process is None
                for key, _ in self._selector.select(_POLL_S if is_waiting else None):
                    if key.fileobj in self._selector.get_map():  # not unregistered by an event before
                        key.data()
                if not self._has_ended and os.getppid() != self._trainer:
                    self._trainer_ended()
                self._remove_dropped()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _is_done(self) -> bool:
        is_used = any(client.num_open > 0 for client in self._clients.values())
        return self._has_ended and not self._expected and not self._dropped and not is_used

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        client = self._clients[connection.fileno()] = _Client(connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(client))

    def _serve(self, client: _Client) -> None:
        try:
            for pid, is_closed, name in client.read():
                client.num_open += -1 if is_closed else 1
                if not is_closed:
                    client.connection.sendall(b"OK")
                elif pid in self._expected.get(name, ()):
                    self._expected[name].remove(pid)
        except (OSError, EOFError):
            self._selector.unregister(client.connection)
            self._clients.pop(client.connection.fileno(), None)
            client.connection.close()

    def _read_commands(self) -> None:
        data = os.read(0, 65536)
        if not data:
            self._selector.unregister(0)
            self._end()
            return
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            command, name, *pids = (*line.decode().split(), "")
            if command == "expect":
                self._expected.setdefault(name, []).extend(int(pid) for pid in pids if pid)
            elif command == "idle":
                self._expected[name] = []
            elif command == "drop":
                self._drop(name)
            elif command == "end":
                self._end()

    def _trainer_ended(self) -> None:
        os.set_blocking(0, False)
        try:
            while 0 in self._selector.get_map():
                self._read_commands()
        except BlockingIOError:  # a forked child of the trainer keeps the pipe open
            self._selector.unregister(0)
        if self._process is not None:
            self._selector.unregister(self._process)
            self._process = None
        self._patience_s = min(self._patience_s, _PATIENCE_WITHOUT_TRAINER_S)
        latest = time.monotonic() + self._patience_s
        self._dropped = {name: min(deadline, latest) for name, deadline in self._dropped.items()}
        self._end()

    def _end(self) -> None:
        self._has_ended = True
        for name in self._expected:
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._dropped.setdefault(name, time.monotonic() + self._patience_s)

    def _remove_dropped(self) -> None:
        for name, deadline in list(self._dropped.items()):
            expected = [pid for pid in self._expected.get(name, ()) if _is_running(pid)]
            if any(client.num_open > 0 for client in self._clients.values()):
                deadline = self._dropped[name] = max(deadline, time.monotonic() + self._patience_s)
            if not expected or time.monotonic() > deadline:
                (SHARED_MEMORY / name).unlink(missing_ok=True)
                del self._dropped[name]
                self._expected.pop(name, None)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def main() -> None:
    """Print the socket's path and work. What does not begin with ``/`` says why it can't."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends by itself, and after the trainer
    with suppress(OSError):  # only some users may: a server waits 1 s for an answer, also beside busy programs
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    with suppress(OSError, ValueError):  # a descriptor for each rank of each server
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        keeper = Keeper(int(sys.argv[1]), float(sys.argv[2]))
    except OSError as error:
        sys.exit(sys.stdout.write(f"{error.strerror}: {error.filename or SHARED_MEMORY}\n"))
    sys.stdout.write(f"{keeper.path}\n")
    sys.stdout.close()
    keeper.run()


if __name__ == "__main__":
    main()
