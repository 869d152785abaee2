"""One run of a program that listens on a port, and what this run holds here: supervisor, ports, log, key file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrl_sglang.errors import ServerStartError
from torchrl_sglang.server import supervisor
from torchrl_sglang.server.diagnosis import describe_exit, explain_failure
from torchrl_sglang.server.ports import PortReservation, listens_on, reserve_port

__all__ = ["LaunchSpec", "ManagedProcess", "read_end"]

_LAUNCH_TIMEOUT_S = 30.0  # until the supervisor, a bare Python, has forked the program: milliseconds
_REAP_TIMEOUT_S = 10.0  # until the supervisor has reaped a killed tree: milliseconds, unless memory is swapped out


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """How to start a program.

    Attributes:
        build_command: its command line, given its HTTP port, a second port of its own, and the path of its key file.
        environment: its whole environment.
        host: address to listen on.
        log_name: first part of the log's file name.
        log_dir: folder of the log; ``None`` is a temporary one.
        keys: content of the key file; ``None`` writes none.
        secrets: words that the log must not show.
    """

    build_command: Callable[[int, int, Path | None], list[str]]
    environment: dict[str, str]
    host: str
    log_name: str
    log_dir: Path | None = None
    keys: str | None = None
    secrets: Sequence[str] = ()


@dataclass(slots=True)
class ManagedProcess:
    """Started by :meth:`launch`, over after :meth:`kill`.

    Attributes:
        supervisor: the process between owner and program; its pid is the session id of all the program's processes.
        pid: the program's main process.
        port: HTTP port.
        log_path: what the program writes, keys blacked out.
        keep_log: :meth:`kill` leaves the log, also in a temporary folder.
        owner_pid: the process that launched it; in a fork of that process :meth:`kill` does nothing.
    """

    supervisor: subprocess.Popen[bytes]
    pid: int
    port: int
    log_path: Path
    reservations: tuple[PortReservation, ...]
    key_file: Path | None
    temporary_folder: Path | None
    owner_pid: int
    keep_log: bool = False

    @classmethod
    def launch(cls, spec: LaunchSpec, *, port: int | None) -> ManagedProcess:
        """Start a program and return at once.

        Args:
            spec: how to start it.
            port: port to listen on; ``None`` picks a free one.

        Raises:
            ServerStartError: the port is taken, or no process could be started.
        """
        with contextlib.ExitStack() as undo:
            http, second = _reserve_ports(spec.host, port)
            for reservation in (http, second):
                undo.callback(reservation.close)
            temporary = None if spec.log_dir else Path(tempfile.mkdtemp(prefix="torchrl-sglang-"))
            if temporary is not None:
                undo.callback(shutil.rmtree, temporary, ignore_errors=True)
            folder = (spec.log_dir or temporary or Path()).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            log_path = folder / f"{spec.log_name}-{http.port}.log"
            log_path.unlink(missing_ok=True)
            supervisor.rotated_path(log_path).unlink(missing_ok=True)
            key_file = folder / f".keys-{os.getpid()}-{http.port}.yaml" if spec.keys else None
            order = {
                "owner_pid": os.getpid(),
                "command": spec.build_command(http.port, second.port, key_file),
                "log_path": str(log_path),
                "secrets": list(spec.secrets),
                "secret_file": {"path": str(key_file), "content": spec.keys} if spec.keys else None,
            }
            process, pid = _start_supervisor(order, spec.environment, log_path)
            undo.pop_all()
        return cls(process, pid, http.port, log_path, (http, second), key_file, temporary, os.getpid())

    @property
    def is_alive(self) -> bool:
        """Whether the main process runs. Once this is ``False``, all its other processes have ended too."""
        process = self.supervisor
        if process.returncode is not None:
            return False
        main = supervisor.process_row(self.pid)
        if main is not None and main.parent == process.pid and main.state != "Z":
            return True
        # The supervisor is cleaning up, or was killed itself. Its pid can't be reused until its exit status is taken:
        # kill its descendants before that.
        deadline = time.monotonic() + _REAP_TIMEOUT_S
        while not _has_ended(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._kill_tree()
        return False

    @property
    def is_listening(self) -> bool:
        """Whether this program, and not another one, listens on the port."""
        return listens_on(self.supervisor.pid, self.port)

    @property
    def has_crashed(self) -> bool:
        """Whether it ended by itself with an error."""
        return not self.is_alive and self.supervisor.returncode != 0

    def crash_report(self) -> str:
        """How it ended, the likely cause, and the end of its log."""
        code = self.supervisor.returncode
        log = read_end(self.log_path)
        tail = "\n".join(log.splitlines()[-15:])
        cause = explain_failure(log, code)
        return f"ended with {describe_exit(code)}. {cause}\nLog: {self.log_path}, which ends:\n{tail}"

    def delete_key_file(self) -> None:
        """Call once the program has read its keys."""
        if self.key_file is not None:
            self.key_file.unlink(missing_ok=True)

    def terminate(self, timeout_s: float) -> None:
        """Send SIGTERM, and wait at most this long for the end."""
        self.supervisor.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.supervisor.wait(timeout_s)

    def kill(self) -> None:
        """Kill all its processes, take the exit status, release ports and files. May be called repeatedly."""
        if self.owner_pid != os.getpid():
            return  # a fork of the owner must not kill the owner's process
        if self.supervisor.returncode is None:
            self._kill_tree()
        for reservation in self.reservations:
            reservation.close()
        self.delete_key_file()
        if self.temporary_folder is not None and not self.keep_log:
            shutil.rmtree(self.temporary_folder, ignore_errors=True)

    def _kill_tree(self) -> None:
        # Only what is below the supervisor: the supervisor reaps it, so that no zombie stays, and then ends by itself.
        supervisor.kill_tree(self.supervisor.pid)
        try:
            self.supervisor.wait(_REAP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            self.supervisor.wait()


def read_end(path: Path, num_bytes: int = 65536) -> str:
    """The last bytes of a log as text, with those of its rotated file where it is shorter; empty if unreadable."""
    end = _last_bytes(path, num_bytes)
    if len(end) < num_bytes:
        end = _last_bytes(supervisor.rotated_path(path), num_bytes - len(end)) + end
    return end.decode(errors="replace")


def _last_bytes(path: Path, num_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - num_bytes))
            return file.read()
    except OSError:
        return b""


def _reserve_ports(host: str, port: int | None) -> tuple[PortReservation, PortReservation]:
    http = reserve_port(host, port)
    if http is None:
        wanted = f"port {port} on {host!r} is in use, or reserved for a server that is starting"
        raise ServerStartError(
            f"{wanted if port else f'no free port on {host!r}'}. Nothing was started. Give another port or host; "
            "port=None picks a free port."
        )
    second = reserve_port()
    if second is None:
        http.close()
        raise ServerStartError("no free second port, for the rendezvous of a server's ranks. Nothing was started.")
    return http, second


def _start_supervisor(
    order: dict[str, Any], environment: dict[str, str], log_path: Path
) -> tuple[subprocess.Popen[bytes], int]:
    """Start the supervisor, send it its order, and return it with the program's pid."""
    with open(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:  # noqa: PTH123
        process = subprocess.Popen(
            # The program's own Python: it is installed, and -I -S keep its packages and PYTHONPATH out.
            [order["command"][0], "-I", "-S", supervisor.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal reaches the owner only, which then stops the program
        )
    assert process.stdin is not None
    assert process.stdout is not None
    too_late = threading.Timer(_LAUNCH_TIMEOUT_S, process.kill)
    too_late.start()
    try:
        with process.stdin, process.stdout:
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
            return process, int(process.stdout.readline())
    except BaseException as error:  # also Ctrl-C in these milliseconds
        supervisor.kill_tree(process.pid)
        process.kill()
        process.wait()
        if not isinstance(error, (ValueError, OSError)):
            raise
        tail = read_end(log_path)
        raise ServerStartError(f"the process could not be started:\n{tail}", log_tail=tail) from error
    finally:
        too_late.cancel()


def _has_ended(pid: int) -> bool:
    """Whether this child process has ended; leaves its exit status, so that its pid stays reserved."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # other code in this process has taken the exit status
        return True
