"""Options of commands that launch a server, and the launch with a progress line."""

from __future__ import annotations

import argparse
import shlex
import sys

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.progress import PhaseLine
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.server.locate import find_python

__all__ = ["add_server_options", "launch", "server_config"]


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
    return ServerConfig(
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


def launch(config: ServerConfig) -> SGLangServer:
    """Launch a server and wait until it is ready, showing the phases of its start."""
    python = find_python(config)
    where = f" (with {python})" if python != sys.executable else ""
    print(f"starting SGLang on {config.model}{where}", file=sys.stderr, flush=True)
    with PhaseLine() as show:
        return SGLangServer(config).start(progress=show)
