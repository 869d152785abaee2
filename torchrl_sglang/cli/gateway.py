"""Serve agents: an OpenAI-compatible gateway before SGLang servers, which records every token.

    torchrl-sglang gateway --url http://host:30000 --port 8000
    torchrl-sglang gateway --model Qwen/Qwen3-0.6B         # launches a server until the command ends

When agents are served, the command prints the gateway's address to standard output, on a line of its own:

    ready http://127.0.0.1:8000

A session is made with POST /sessions, which answers with the base_url and the api_key for an agent's OpenAI client.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_sglang.cli.launching import add_server_options, launch, server_config
from torchrl_sglang.cli.target import add_generation_options, generation_settings
from torchrl_sglang.cli.termination import Termination
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.config.api_keys import new_key, read_key
from torchrl_sglang.errors import ServerError
from torchrl_sglang.server import SGLangServer

if TYPE_CHECKING:
    from torchrl_sglang.agents.gateway import AgentGateway

__all__ = ["add_arguments", "run"]

_POLL_S = 0.2
_OBJECTS_PER_COLLECTION = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--admin-key-file", type=Path, metavar="FILE", help="file with the key that POST /sessions must have"
    )
    parser.add_argument("--public-url", metavar="URL", help="the gateway's address as agents see it")
    parser.add_argument(
        "--session-timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="a session whose agent is silent for so long expires (default: 1800)",
    )
    parser.add_argument(
        "--max-sessions", type=int, default=10_000, metavar="N", help="most sessions that are kept (default: 10000)"
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        type=_override,
        metavar="NAME=VALUE",
        help="a sampling setting in place of what agents ask for, such as temperature=1.0; may be given several times",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the server's own")
    models = parser.add_argument_group("the model")
    where = models.add_mutually_exclusive_group()
    where.add_argument(
        "--url", nargs="+", default=["http://127.0.0.1:30000"], help="running servers (default: http://127.0.0.1:30000)"
    )
    where.add_argument(
        "--model", help="path or hub name of a checkpoint, or SmolLM2: launches a server until the command ends"
    )
    models.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with the server's key")
    models.add_argument(
        "--ca-certificate", metavar="FILE", help="certificate of the private authority of an https:// server"
    )
    models.add_argument("--adapter", metavar="NAME", help="LoRA adapter to use")
    add_generation_options(parser)
    add_server_options(parser)


def _override(text: str) -> tuple[str, Any]:
    """A setting's name and its value, as JSON where it is some.

    Examples:
        >>> _override("temperature=1.0"), _override("seed=null"), _override("stop=END")
        (('temperature', 1.0), ('seed', None), ('stop', 'END'))
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE such as temperature=1.0")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM, or until a launched server ends."""
    from torchrl_sglang.agents.gateway import AgentGateway
    from torchrl_sglang.agents.open_files import raise_limit
    from torchrl_sglang.agents.settings import SessionSettings
    from torchrl_sglang.model_files import load_tokenizer

    admin_key = None if args.admin_key_file is None else read_key(args.admin_key_file)
    client = ClientConfig(api_key_file=args.api_key_file, ca_certificate=args.ca_certificate)
    if args.model is not None:
        client = replace(client, api_key=client.api_key or new_key())
    settings = SessionSettings(
        generation=generation_settings(args),
        overrides=dict(args.override),
        adapter=args.adapter,
        session_timeout_s=args.session_timeout,
        max_sessions=args.max_sessions,
    )
    raise_limit()
    try:
        with Termination() as termination, _servers(args, client.api_key) as (urls, launched):
            gateway = AgentGateway(
                urls,
                tokenizer=None if args.tokenizer is None else load_tokenizer(args.tokenizer),
                host=args.host,
                port=args.port,
                admin_key=admin_key,
                public_url=args.public_url,
                settings=settings,
                client=client,
            )
            with gateway:
                # What was imported stays: to look through it for garbage takes 100 ms in the middle of turns.
                gc.collect()
                gc.freeze()
                # Turns leave hardly any cycles: with the usual 700, the search for them takes a tenth of the CPU time.
                gc.set_threshold(_OBJECTS_PER_COLLECTION)
                print(f"ready {gateway.url}", flush=True)
                print("Ctrl-C stops the gateway", file=sys.stderr, flush=True)
                _wait(gateway, launched, termination)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
    return 0


@contextlib.contextmanager
def _servers(args: argparse.Namespace, key: str | None) -> Iterator[tuple[list[str], SGLangServer | None]]:
    """The servers' addresses; a launched server stops at the end of the block."""
    if args.model is None:
        yield args.url, None
        return
    server = launch(server_config(args, api_key=key))
    try:
        yield [server.url], server
    finally:
        server.stop()


def _wait(gateway: AgentGateway, launched: SGLangServer | None, termination: Termination) -> None:
    """Wait for Ctrl-C or SIGTERM.

    Raises:
        ServerError: the launched server or the gateway ended.
    """
    while gateway.is_running:
        termination.check()
        if launched is not None:
            launched.check()
        time.sleep(_POLL_S)
    raise ServerError("the gateway's thread ended; its traceback is above")
