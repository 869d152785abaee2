"""The fake server as a separate process, which can be killed, be suspended, and die at any point of a request."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.fake_sglang.faults import Fault
from tests.fake_sglang.settings import FakeSettings

__all__ = ["FakeServerProcess"]

ROOT = Path(__file__).resolve().parents[2]
"""Where ``python -m tests.fake_sglang`` finds this package."""


class FakeServerProcess:
    """A fake server in a child process. The child's working directory is the repository's root.

    Args:
        settings: the server's settings.
        start_timeout_s: how long the process may take until it answers (it imports torch).

    Examples:
        >>> FakeServerProcess(FakeSettings(model_path="/no/such/folder")).start()
        Traceback (most recent call last):
            ...
        RuntimeError: the fake server did not start (exit code 1); its output is on stderr above
    """

    def __init__(self, settings: FakeSettings, *, start_timeout_s: float = 60.0) -> None:
        self.settings = settings
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> FakeServerProcess:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: the process ended or did not answer in time.
        """
        record = asdict(self.settings) | {"model_path": str(self.settings.model_path)}
        command = [sys.executable, "-m", "tests.fake_sglang", "--settings-on-stdin"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(record) + "\n")
        self._process.stdin.flush()  # left open: the child exits when it reads its end, so it ends with this process
        deadline = time.monotonic() + self._start_timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while time.monotonic() < deadline and self._process.poll() is None:
                if selector.select(timeout=0.5):
                    line = self._process.stdout.readline()
                    if line.startswith("ready "):
                        self.url = line.split()[1]
                        return self
                    if not line:
                        self._process.wait(timeout=5.0)
        self.kill()
        raise RuntimeError(
            f"the fake server did not start (exit code {self._process.returncode}); its output is on stderr above"
        )

    def suspend(self) -> None:
        """Suspend the process (SIGSTOP); its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Continue a suspended process (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill the process (SIGKILL) and wait for its end; idempotent."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def wait(self, timeout_s: float) -> int:
        """Wait for the process to end by itself.

        Returns:
            Its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        assert self._process is not None, "not started"
        return self._process.wait(timeout_s)

    @property
    def is_running(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def arm(self, *faults: Fault) -> None:
        """Arm faults; each counts requests from now on."""
        self._admin("POST", "/fake/faults", [fault.to_json() for fault in faults])

    def disarm(self) -> None:
        """Disarm all faults."""
        self._admin("DELETE", "/fake/faults")

    def set_state(self, *, session_open: bool | None = None, weight_version: str | None = None) -> None:
        """Set state as another trainer might have left it."""
        self._admin("POST", "/fake/state", {"session_open": session_open, "weight_version": weight_version})

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every request in the order of arrival, see :attr:`FakeServer.events`."""
        events: list[dict[str, Any]] = self._admin("GET", "/fake/events")
        return events

    def _admin(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method)
        with urllib.request.urlopen(request, timeout=10.0) as reply:
            return json.load(reply)

    def __enter__(self) -> FakeServerProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
