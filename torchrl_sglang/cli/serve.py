"""Launch an SGLang server and keep it running until Ctrl-C.

When the server is ready, the command prints its address to standard output, on a line of its own:

    ready http://127.0.0.1:30000

From then on it copies the server's log to standard error.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from torchrl_sglang.cli.launching import add_server_options, launch, server_config
from torchrl_sglang.cli.termination import Termination
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.server.command import is_loopback

__all__ = ["add_arguments", "run"]


_POLL_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("model", metavar="MODEL", help="path or hub name of the checkpoint, or SmolLM2")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=30000, help="port to listen on (default: 30000)")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with the key that requests must have")
    keys.add_argument("--no-api-key", action="store_true", help="serve everyone who reaches --host")
    parser.add_argument("--quiet", action="store_true", help="do not show the server's log")
    add_server_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM, or until the server ends by itself."""
    if not (is_loopback(args.host) or args.api_key_file or args.no_api_key):
        raise ConfigError(
            f"--host {args.host} is reached from other machines, and whoever reaches a server without a key can load "
            "weights into it from any path: give --api-key-file FILE. --no-api-key serves everyone"
        )
    key = False if args.no_api_key else None
    config = server_config(args, host=args.host, port=args.port, api_key=key, api_key_file=args.api_key_file)
    with Termination() as termination:
        return _serve(config, termination, quiet=args.quiet)


def _serve(config: ServerConfig, termination: Termination, *, quiet: bool) -> int:
    server = launch(config)
    try:
        print(f"ready {server.url}", flush=True)
        print("Ctrl-C stops the server", file=sys.stderr, flush=True)
        _follow(server, termination, quiet=quiet)
    except KeyboardInterrupt:
        print("\nstopping the server", file=sys.stderr, flush=True)
    finally:
        server.stop()
    return 0


def _follow(server: SGLangServer, termination: Termination, *, quiet: bool) -> None:
    """Copy the log to standard error as it grows; raises when the server ends."""
    position = server.log_path.stat().st_size if server.log_path is not None else 0
    while True:
        termination.check()
        server.check()
        if not quiet and server.log_path is not None:
            with server.log_path.open("rb") as log:
                log.seek(position)
                new = log.read()
            position += len(new)
            sys.stderr.write(new.decode(errors="replace"))
            sys.stderr.flush()
        time.sleep(_POLL_S)
