"""Options of commands that launch a server, and the launch with a line that shows it is alive."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.server import SGLangServer

__all__ = ["add_server_options", "launch", "server_config"]


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add what a server can be told."""
    group = parser.add_argument_group("the server")
    group.add_argument("--python", metavar="PATH", help="Python that has SGLang installed (default: this one)")
    group.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="default: a GPU if there is one, else the CPU"
    )
    group.add_argument(
        "--tp-size", type=int, default=1, metavar="N", help="GPUs (or CPU parts) the model is split over"
    )
    group.add_argument("--dtype", help="default: the checkpoint's on a GPU, float32 on a CPU")
    group.add_argument("--context-length", type=int, metavar="TOKENS", help="default: the checkpoint's")
    group.add_argument("--start-timeout", type=float, default=600.0, metavar="SECONDS", help="default: 600")
    group.add_argument(
        "--server-args",
        default="",
        metavar="WORDS",
        help="more of SGLang's own flags, in quotes: --server-args='--enable-lora --max-lora-rank 8'",
    )


def server_config(args: argparse.Namespace, **more: object) -> ServerConfig:
    """The server that the options describe."""
    return ServerConfig(
        model=args.model,
        python=args.python,
        device=args.device,
        tp_size=args.tp_size,
        dtype=args.dtype,
        context_length=args.context_length,
        start_timeout_s=args.start_timeout,
        extra_args=tuple(shlex.split(args.server_args)),
        stop_timeout_s=0.0,  # SGLang has nothing to save, and takes 6-9 s to end by itself
        **more,  # type: ignore[arg-type]
    )


def launch(config: ServerConfig) -> SGLangServer:
    """Launch a server, with one line on the terminal that is rewritten while it loads."""
    server = SGLangServer(config)
    shown = sys.stderr.isatty()

    def progress(line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        if shown:
            print(f"\r{f'loading, {line}'[:width]:<{width}}", end="", file=sys.stderr, flush=True)

    print(f"starting SGLang on {config.model}", file=sys.stderr, flush=True)
    try:
        return server.start(progress=progress)
    finally:
        if shown:
            print(f"\r{'':<{shutil.get_terminal_size().columns - 1}}\r", end="", file=sys.stderr, flush=True)
