"""Measures the time from launch to ready beside SGLang's own command with the same flags and environment.

    python benchmarks/launch_time.py               # tiny model: about 6 minutes
    python benchmarks/launch_time.py --pairs 3

They run in turn:

    bare     start `python -m sglang.launch_server`, ask /ready every 50 ms until it answers 200
    engine   AsyncSGLang.from_pretrained(model), which also checks the model, supervises the process and connects

Both servers are killed afterwards, outside of the time. Target: 1.05.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import Recorder, add_common_arguments

from torchrl_sglang import AsyncSGLang, ServerConfig
from torchrl_sglang.server.command import build_command
from torchrl_sglang.server.environment import child_environment
from torchrl_sglang.server.locate import find_python
from torchrl_sglang.testing import make_tiny_model

START_TIMEOUT_S = 600
POLL_S = 0.05


class Bare:
    """SGLang's own command."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        config, port = self._config, free_port()
        same_python = find_python(config) == sys.executable
        self._process = subprocess.Popen(
            build_command(config, port=port, rendezvous_port=free_port(), cpu=True),
            env=child_environment(config, os.environ, cpu=True, same_python=same_python),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(port):
            if self._process.poll() is not None:
                raise RuntimeError(f"the bare server ended with status {self._process.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the bare server was not ready after {START_TIMEOUT_S} s")
            time.sleep(POLL_S)

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Engine:
    """The same by this package."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._engine: AsyncSGLang | None = None

    def __call__(self) -> None:
        self._engine = AsyncSGLang.from_pretrained(
            self._model, device="cpu", api_key=False, start_timeout_s=START_TIMEOUT_S
        )

    def end(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            for server in engine.servers:
                server.kill()
            engine.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="checkpoint to serve (default: a tiny llama)")
    add_common_arguments(parser, pairs=7)
    args = parser.parse_args()
    record = Recorder("launch", args.rows, args.max_repeats)
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        model = args.model or str(make_tiny_model(Path(folder) / "model"))
        print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {model}", flush=True)
        bare, engine = Bare(ServerConfig(model=model, device="cpu", api_key=False)), Engine(model)

        def end() -> None:
            bare.end()
            engine.end()

        try:
            record.measure(
                "AsyncSGLang.from_pretrained beside sglang.launch_server",
                {"bare": bare, "engine": engine},
                pairs=args.pairs,
                warm_ups=1 if args.pairs > 1 else 0,  # the first start reads SGLang's files from the disk
                before_each=end,
            )
        finally:
            end()


if __name__ == "__main__":
    main()
