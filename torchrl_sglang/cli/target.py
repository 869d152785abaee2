"""Options of commands that use a model: the address of a running server, or a model for which to launch one."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrl_sglang.cli.launching import add_server_options, launch, server_config
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.config.api_keys import new_key

__all__ = ["add_generation_options", "add_target_options", "generation_settings", "target"]

_SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the server."""
    group = parser.add_argument_group("the model")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--url", help="address of a running server (default: http://127.0.0.1:30000)")
    where.add_argument(
        "--model", help="path or hub name of a checkpoint, or SmolLM2: launches a server until the command ends"
    )
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with the server's key")
    group.add_argument(
        "--ca-certificate", metavar="FILE", help="certificate of the private authority of an https:// server"
    )
    group.add_argument("--adapter", metavar="NAME", help="LoRA adapter to use")
    add_server_options(parser)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of generation; the checkpoint decides those that are not given."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest response (default: what fits; generate without --chat: 128)",
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--repetition-penalty", type=float, metavar="R")
    group.add_argument("--seed", type=int, help="needs a server with --enable-deterministic-inference")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end a response here; may be repeated")


def generation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The generation options that were given."""
    return {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}


@contextlib.contextmanager
def target(args: argparse.Namespace) -> Iterator[tuple[str, ClientConfig]]:
    """The server's address and the client's settings; a launched server stops at the end of the block."""
    config = ClientConfig(api_key_file=args.api_key_file, ca_certificate=args.ca_certificate)
    if args.model is None:
        yield args.url or "http://127.0.0.1:30000", config
        return
    config = replace(config, api_key=config.api_key or new_key())
    server = launch(server_config(args, api_key=config.api_key))
    try:
        yield server.url, config
    finally:
        server.stop()
