"""One running server process and all it holds on this machine: supervisor, ports, log, key file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ServerStartError
from torchrl_sglang.server import command, supervisor
from torchrl_sglang.server.diagnosis import describe_exit, explain_failure
from torchrl_sglang.server.environment import child_environment
from torchrl_sglang.server.ports import PortReservation, listens_on, reserve_port

__all__ = ["Child", "read_end"]

_LAUNCH_TIMEOUT_S = 30.0  # until the supervisor, a bare Python, has forked the server: milliseconds
_REAP_TIMEOUT_S = 10.0  # until the supervisor has reaped a killed tree: milliseconds, unless memory is swapped out


@dataclass(slots=True)
class Child:
    """Made by :meth:`launch`, over with :meth:`end`.

    Attributes:
        supervisor: the process between us and the server; its pid is the session all of the server's processes are in.
        pid: the server's main process.
        port: HTTP port.
        log_path: what the server writes, keys blacked out.
        keep_log: leave the log where it is when a temporary folder is cleared up.
        owner_pid: the process that launched it; in a fork of that one :meth:`end` does nothing.
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
    def launch(cls, config: ServerConfig, *, port: int | None, cpu: bool, weight_version: str | None = None) -> Child:
        """Start a server.

        Args:
            config: the server; already checked.
            port: port to listen on; ``None`` picks a free one.
            cpu: run on the CPU engine.
            weight_version: what the server calls the checkpoint's weights.

        Raises:
            ConfigError: fewer GPUs or cores are visible than it needs.
            ServerStartError: the port is taken, or no process could be started.
        """
        same_python = config.python is None or command.find_python(config) == sys.executable

        def build(port: int, rendezvous_port: int, key_file: Path | None) -> list[str]:
            return command.build_command(
                config,
                port=port,
                rendezvous_port=rendezvous_port,
                cpu=cpu,
                key_file=key_file,
                weight_version=weight_version,
            )

        return cls.run(
            build,
            name="sglang",
            host=config.host,
            port=port,
            variables=child_environment(config, os.environ, cpu=cpu, same_python=same_python),
            log_dir=config.log_dir,
            keys=command.keys_as_yaml(config),
            secrets=command.key_spellings(config),
        )

    @classmethod
    def run(
        cls,
        build: Callable[[int, int, Path | None], list[str]],
        *,
        name: str,
        host: str,
        port: int | None,
        variables: dict[str, str],
        log_dir: Path | None,
        keys: str | None = None,
        secrets: Sequence[str] = (),
    ) -> Child:
        """Start a program that listens.

        Args:
            build: its command line, given its HTTP port, a second port of its own, and the file with its keys.
            name: what its log is called.
            host: address to listen on.
            port: port to listen on; ``None`` picks a free one.
            variables: its whole environment.
            log_dir: folder of its log; ``None`` is a temporary one.
            keys: contents of the file with its keys.
            secrets: words that its log shall not show.

        Raises:
            ServerStartError: the port is taken, or no process could be started.
        """
        with contextlib.ExitStack() as undo:
            http, second = _reserve_ports(host, port)
            for reservation in (http, second):
                undo.callback(reservation.close)
            temporary = None if log_dir else Path(tempfile.mkdtemp(prefix="torchrl-sglang-"))
            if temporary is not None:
                undo.callback(shutil.rmtree, temporary, ignore_errors=True)
            folder = (log_dir or temporary or Path()).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            log_path = folder / f"{name}-{http.port}.log"
            log_path.unlink(missing_ok=True)
            key_file = folder / f".keys-{os.getpid()}-{http.port}.yaml" if keys else None
            order = {
                "owner_pid": os.getpid(),
                "command": build(http.port, second.port, key_file),
                "log_path": str(log_path),
                "secrets": list(secrets),
                "secret_file": {"path": str(key_file), "content": keys} if keys else None,
            }
            process, pid = _start_supervisor(order, variables, log_path)
            undo.pop_all()
        return cls(process, pid, http.port, log_path, (http, second), key_file, temporary, os.getpid())

    @property
    def is_alive(self) -> bool:
        """Whether the server's main process runs. When it has ended, so has everything else of it, on return."""
        process = self.supervisor
        if process.returncode is not None:
            return False
        main = supervisor.process_row(self.pid)
        if main is not None and main.parent == process.pid and main.state != "Z":
            return True
        # The supervisor is clearing up, or was killed itself. Until its exit status is taken its pid can't become
        # anyone else's: look below it before.
        deadline = time.monotonic() + _REAP_TIMEOUT_S
        while not _has_ended(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._kill()
        return False

    @property
    def is_listening(self) -> bool:
        """Whether it is this server, and no other program, that listens on the port."""
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

    def forget_keys(self) -> None:
        """Delete the key file: the server has read it."""
        if self.key_file is not None:
            self.key_file.unlink(missing_ok=True)

    def ask_to_end(self, timeout_s: float) -> None:
        """Send SIGTERM, and wait this long at most."""
        self.supervisor.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.supervisor.wait(timeout_s)

    def end(self) -> None:
        """Kill the whole tree, take the exit status, give everything back. Again and again does no harm."""
        if self.owner_pid != os.getpid():
            return  # a forked child must not take the server down with it
        if self.supervisor.returncode is None:
            self._kill()
        for reservation in self.reservations:
            reservation.close()
        self.forget_keys()
        if self.temporary_folder is not None and not self.keep_log:
            shutil.rmtree(self.temporary_folder, ignore_errors=True)

    def _kill(self) -> None:
        # Below the supervisor only: it reaps them, so that no zombie stays, and then ends by itself.
        supervisor.kill_tree(self.supervisor.pid)
        try:
            self.supervisor.wait(_REAP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            self.supervisor.wait()


def read_end(path: Path, num_bytes: int = 65536) -> str:
    """The last bytes of a file as text; empty when it can't be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - num_bytes))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _reserve_ports(host: str, port: int | None) -> tuple[PortReservation, PortReservation]:
    http = reserve_port(host, port)
    if http is None:
        wanted = f"port {port} on {host!r} is in use, or promised to a server that is starting up"
        raise ServerStartError(
            f"{wanted if port else f'no free port on {host!r}'}. Nothing was started. Give another port or host; "
            "port=None picks a free port."
        )
    rendezvous = reserve_port()
    if rendezvous is None:
        http.close()
        raise ServerStartError("no free second port (a server's ranks meet there). Nothing was started.")
    return http, rendezvous


def _start_supervisor(
    order: dict[str, Any], variables: dict[str, str], log_path: Path
) -> tuple[subprocess.Popen[bytes], int]:
    """Start the supervisor, hand it its order, and return it with the server's pid."""
    with open(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:  # noqa: PTH123
        process = subprocess.Popen(
            # The server's own Python: it is there, and -I -S keep its packages and PYTHONPATH out.
            [order["command"][0], "-I", "-S", supervisor.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=variables,
            start_new_session=True,  # Ctrl-C in the terminal is for us; we end the server in our own time
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
    except (ValueError, OSError) as error:
        supervisor.kill_tree(process.pid)
        process.kill()
        process.wait()
        tail = read_end(log_path)
        raise ServerStartError(f"the server's process could not be started:\n{tail}", log_tail=tail) from error
    except BaseException:  # Ctrl-C in these milliseconds
        supervisor.kill_tree(process.pid)
        process.kill()
        process.wait()
        raise
    finally:
        too_late.cancel()


def _has_ended(pid: int) -> bool:
    """Whether our child has ended, without taking its exit status (so that its pid stays reserved)."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # somebody else in this process takes all exit statuses
        return True
