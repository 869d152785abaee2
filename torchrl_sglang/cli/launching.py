"""Options of commands that launch a server, and the launch with a progress line."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.server import SGLangServer, needs_cpu_engine

__all__ = ["CPU_SERVER", "add_server_options", "launch", "server_config"]

CPU_SERVER = Path("~/.cache/torchrl-sglang/cpu-server")
"""Default folder of ``install-cpu-server``; commands that launch a server look for one there."""


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a launched server."""
    group = parser.add_argument_group("the server")
    group.add_argument(
        "--python", metavar="PATH", help="Python that has SGLang (default: this one, else that of install-cpu-server)"
    )
    group.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="default: a GPU if there is one, else the CPU"
    )
    group.add_argument(
        "--tp-size", type=int, default=1, metavar="N", help="GPUs (or CPU parts) the model is split over"
    )
    group.add_argument("--dtype", help="default: float32 on a CPU, SGLang's own choice on a GPU")
    group.add_argument("--context-length", type=int, metavar="TOKENS", help="default: the checkpoint's")
    group.add_argument("--start-timeout", type=float, default=600.0, metavar="SECONDS", help="default: 600")
    group.add_argument(
        "--server-args",
        default="",
        metavar="WORDS",
        help="more of SGLang's own flags, in quotes: --server-args='--enable-lora --max-lora-rank 8'",
    )


def server_config(args: argparse.Namespace, **more: object) -> ServerConfig:
    """The settings that the options describe."""
    config = ServerConfig(
        model=args.model,
        python=args.python,
        device=args.device,
        tp_size=args.tp_size,
        dtype=args.dtype,
        context_length=args.context_length,
        start_timeout_s=args.start_timeout,
        extra_args=tuple(shlex.split(args.server_args)),
        stop_timeout_s=0.0,  # SGLang has nothing to save, and takes 6-9 s to end after SIGTERM
        **more,  # type: ignore[arg-type]
    )
    installed = CPU_SERVER.expanduser() / "bin" / "python"
    has_none = config.python is None and importlib.util.find_spec("sglang") is None
    if has_none and installed.is_file() and needs_cpu_engine(config):
        return replace(config, python=str(installed))
    return config


def launch(config: ServerConfig) -> SGLangServer:
    """Launch a server and wait until it is ready; a terminal shows one progress line meanwhile."""
    server = SGLangServer(config)
    shown = sys.stderr.isatty()

    def progress(line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        if shown:
            print(f"\r{f'loading, {line}'[:width]:<{width}}", end="", file=sys.stderr, flush=True)

    where = f" (with {config.python})" if config.python else ""
    print(f"starting SGLang on {config.model}{where}", file=sys.stderr, flush=True)
    try:
        return server.start(progress=progress)
    finally:
        if shown:
            print(f"\r{'':<{shutil.get_terminal_size().columns - 1}}\r", end="", file=sys.stderr, flush=True)
