"""Life cycle of a child process: launch, wait until ready, crash report, launch again at the same address, stop.

:class:`SGLangServer` and :class:`SGLangRouter` each have one :class:`ProcessLifecycle`, and add only what is their own:
the command, the environment and the readiness check.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchrl_sglang.errors import ConfigError, ServerError, ServerStartError
from torchrl_sglang.forks import ForkSafeLock
from torchrl_sglang.server.diagnosis import ADDRESS_IN_USE
from torchrl_sglang.server.managed_process import LaunchSpec, ManagedProcess, read_end

__all__ = ["ProcessLifecycle"]

_POLL_S = 0.2
_WHOLE_LOG = 100_000  # lines; a phase is recognised by what was logged since the launch
_LAUNCH_TRIES = 3  # with a new port each, when another program takes the port that was picked


class ProcessLifecycle:
    """Runs one program as a child process, and after each end again at the same address.

    All its processes end with :meth:`stop`, when this object is collected, and at the exit of this process. A copy in a
    forked process is *attached*: it knows the address, and its :meth:`stop` does nothing.

    The callables must not refer to this object or to its owner, so that reference counting alone collects them.

    Args:
        name: what error messages call the program, such as ``"server"``.
        port: port to listen on; ``None`` picks a free one at the first launch.
        url: the base URL for a port.
        probe: readiness check of the program on a port: ``True``, ``False``, or ``None`` when nothing answers.
        start_timeout_s: from launch to ready.
        phase: describes how far the start is, from the log so far.
        attached: another process launched the program.
    """

    def __init__(
        self,
        name: str,
        *,
        port: int | None,
        url: Callable[[int], str],
        probe: Callable[[int], bool | None],
        start_timeout_s: float,
        phase: Callable[[str], str] = lambda log: "starting",
        attached: bool = False,
    ) -> None:
        self.port = port
        self._name = name
        self._url = url
        self._probe = probe
        self._start_timeout_s = start_timeout_s
        self._phase = phase
        self._attached = attached
        self._may_change_port = port is None
        self._process: ManagedProcess | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._lock = ForkSafeLock(threading.RLock)
        self._prepare: Callable[[], LaunchSpec] | None = None
        self._last_log = ""

    # ------------------------------------------------------------------ start

    def launch(self, prepare: Callable[[], LaunchSpec]) -> None:
        """Start the process and return at once.

        Args:
            prepare: checks what can be checked beforehand and returns how to start the program.

        Raises:
            ConfigError: this is an attached copy, the program runs already, or ``prepare`` found a fault.
            ServerStartError: the port is taken, or the process could not be started.
        """
        with self._lock:
            if not self.is_owner:
                raise ConfigError(
                    f"this is an attached copy: the process that launched the {self._name} starts and stops it"
                )
            if self.is_running:
                raise ConfigError(
                    f"the {self._name} at {self.url} is already running: stop() it first, or restart() it"
                )
            self._release()
            self._prepare = prepare
            self._process = ManagedProcess.launch(prepare(), port=self.port)
            self.port = self._process.port
            self._finalizer = weakref.finalize(self, self._process.kill)

    def wait_ready(self, *, progress: Callable[[str], None] | None = None) -> None:
        """Wait until the launched program takes requests; kill it when it doesn't.

        Args:
            progress: called about once a second with one line: what the program is doing, and seconds so far.

        Raises:
            ServerStartError: the process ended, or is not ready within ``start_timeout_s``.
        """
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._kill_and_keep_log)
            started = time.monotonic()
            for last_try in [False] * (_LAUNCH_TRIES - 1) + [True]:
                try:
                    self._wait_ready(started, progress)
                    break
                except ServerStartError as error:
                    taken = ADDRESS_IN_USE.search(error.log_tail) is not None
                    if last_try or not taken or not self._may_change_port or self._prepare is None:
                        raise
                # Another program took the picked port before this one could bind it.
                self._kill_and_keep_log()
                self.port = None
                self.launch(self._prepare)
            self._may_change_port = False  # from now on clients know the address
            on_failure.pop_all()

    def _wait_ready(self, started: float, progress: Callable[[str], None] | None) -> None:
        deadline = started + self._start_timeout_s
        last_progress = started
        while True:
            process = self._process
            if process is None:
                raise ServerStartError(f"the {self._name} was stopped while it was starting")
            if not process.is_alive:
                raise self._start_error(process.crash_report())
            if self._probe(process.port) and process.is_listening:
                process.delete_key_file()
                return
            now = time.monotonic()
            if now > deadline:
                raise self._start_error(
                    f"is not ready after {self._start_timeout_s:g} s and was killed. Give it longer (start_timeout_s), "
                    f"or see why in the log {process.log_path}, which ends:\n{self.log_tail(15)}"
                )
            if progress is not None and now - last_progress >= 1:
                last_progress = now
                progress(f"{self._phase(self.log_tail(_WHOLE_LOG))}, {now - started:.0f} s")
            time.sleep(_POLL_S)

    def _start_error(self, what: str) -> ServerStartError:
        return ServerStartError(f"the {self._name} {what}", server=self.url, log_tail=self.log_tail())

    # ------------------------------------------------------------------ state

    @property
    def url(self) -> str:
        """Base URL that clients can use.

        Raises:
            ConfigError: no port is known yet, because :meth:`launch` picks it.
        """
        if self.port is None:
            raise ConfigError(
                f"the {self._name}'s address is known once it is launched: call start() first, or set a port"
            )
        return self._url(self.port)

    @property
    def is_owner(self) -> bool:
        """Whether this process launched the program, or may launch it."""
        return not self._attached and (self._process is None or self._process.owner_pid == os.getpid())

    @property
    def is_launched(self) -> bool:
        """Whether there is a process that :meth:`stop` has not released yet."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Process id of the main process; ``None`` when it is not running, or this is an attached copy."""
        process = self._process
        return process.pid if process is not None and self.is_owner and process.is_alive else None

    @property
    def is_running(self) -> bool:
        """Whether the process runs (on an attached copy: whether the program answers)."""
        if self.is_owner:
            return self._process is not None and self._process.is_alive
        return self.port is not None and self._probe(self.port) is not None

    @property
    def has_crashed(self) -> bool:
        """Whether it ended by itself with an error, and was neither stopped nor reaped since."""
        process = self._process
        return process is not None and self.is_owner and process.has_crashed

    @property
    def log_path(self) -> Path | None:
        """The log; ``None`` before the launch, after the end, and on attached copies."""
        return self._process.log_path if self._process is not None else None

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log, keys blacked out; of the previous run when nothing runs."""
        log = self._last_log if self._process is None else read_end(self._process.log_path)
        return "\n".join(log.splitlines()[-lines:])

    def check(self) -> None:
        """Raise when the program is not running.

        Raises:
            ServerError: it is not running; after a crash with the crash report.
        """
        if self.is_running:
            return
        url = self.url if self.port is not None else None
        if self._process is None or not self.is_owner:
            raise ServerError(f"the {self._name}{f' at {url}' if url else ''} is not running", server=url)
        raise ServerError(f"the {self._name} at {url} {self._process.crash_report()}", server=url)

    # ------------------------------------------------------------------ stop

    def reap(self) -> str | None:
        """Clean up after a crash; the log stays.

        Returns:
            The crash report: how it ended, the likely cause and the end of the log; ``None`` if it has not crashed.
        """
        with self._lock:
            process = self._process
            if process is None or not self.has_crashed:
                return None
            process.keep_log = True
            crash_report = process.crash_report()
            self._release()
            return crash_report

    def stop(self, *, terminate_s: float = 0.0) -> None:
        """End all processes of the program. Does nothing when none runs, and on attached copies.

        Args:
            terminate_s: first send SIGTERM and wait this long; 0 kills at once.
        """
        with self._lock:
            process = self._process
            if process is None or not self.is_owner:
                return
            if process.has_crashed:
                process.keep_log = True
            elif terminate_s > 0:
                process.terminate(terminate_s)
            self._release()

    def keep_log(self) -> None:
        """Leave the log of this run where it is, also in a temporary folder."""
        if self._process is not None:
            self._process.keep_log = True

    def _kill_and_keep_log(self) -> None:
        with self._lock:
            self.keep_log()
            self.stop()

    def _release(self) -> None:
        """Kill what is left of the last run, and forget it."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._finalizer is not None:
            self._finalizer.detach()
        self._last_log = read_end(process.log_path)
        process.kill()
