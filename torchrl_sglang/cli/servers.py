"""Show or change a list of servers that a running trainer follows.

The list is a text file with a URL per line. A trainer that has called engine.follow("FILE") takes in the servers that
are added to it, and sends them its weights first; a server that is removed finishes its requests. Comments in the file
are lost when it is changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import ConfigError, SGLangError
from torchrl_sglang.server_url import base_url

if TYPE_CHECKING:
    from torchrl_sglang.client import SGLangClient

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("file", metavar="FILE", type=Path, help="the list; --add makes it if there is none")
    parser.add_argument("--add", metavar="URL", nargs="+", default=[], help="servers to add; each must answer")
    parser.add_argument("--remove", metavar="URL", nargs="+", default=[], help="servers to remove")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with the servers' key")
    parser.add_argument("--ca-certificate", metavar="FILE", help="certificate of the authority of https:// servers")


def run(args: argparse.Namespace) -> int:
    """Change the list if asked to, then print a line for each server of it."""
    from torchrl_sglang.client import SGLangClient
    from torchrl_sglang.parallel import side_by_side
    from torchrl_sglang.pool.checks import refuse_same_server
    from torchrl_sglang.pool.server_list import read_server_file, server_file_locked, write_server_file

    config = ClientConfig(api_key_file=args.api_key_file, ca_certificate=args.ca_certificate)

    def read() -> list[str]:
        return read_server_file(args.file) if args.file.exists() or not args.add else []

    added, removed = [base_url(url) for url in args.add], [base_url(url) for url in args.remove]
    listed = read()
    changed = _changed(listed, added, removed)
    clients = {url: SGLangClient(url, config) for url in changed}
    states = side_by_side({url: partial(_state, client) for url, client in clients.items()})
    if changed != listed:
        new = [url for url in changed if url not in listed]
        for url in new:
            states[url].unwrap()
        answering = [clients[url].info for url in changed if url in listed and states[url].error is None]
        refuse_same_server([clients[url].info for url in new], answering)
        with server_file_locked(args.file):  # somebody else may have changed it meanwhile
            write_server_file(args.file, _changed(read(), added, removed))
    if not changed:
        print(f"{args.file} names no server: a trainer that follows it keeps those that it has")
    for url, state in states.items():
        print(f"{url}  {state.value if state.error is None else f'does not answer: {state.error}'}")
    return 0


def _changed(listed: Sequence[str], added: Sequence[str], removed: Sequence[str]) -> list[str]:
    """The list after the changes.

    Raises:
        ConfigError: a server is on the list already, or is not on it, or none would be left.
    """
    for url in added:
        if url in listed:
            raise ConfigError(f"{url} is on the list already")
    for url in removed:
        if url not in listed:
            raise ConfigError(f"{url} is not on the list, which has {', '.join(listed) or 'none'}")
    changed = [url for url in dict.fromkeys((*listed, *added)) if url not in removed]
    if removed and not changed:
        raise ConfigError("no server would be left, and a trainer ignores an empty list: add another one first")
    return changed


def _state(client: SGLangClient) -> str:
    from torchrl_sglang.protocol.control import build_loads, parse_loads

    info = client.connect()
    try:
        load = parse_loads(client.send(build_loads(legacy=not client.dialect.weight_session)))
        requests = f"{load} request{'' if load == 1 else 's'}"
    except SGLangError as error:
        requests = f"load unknown ({error})"
    return f"{info.model_path}  weights {info.weight_version}  {requests}"
