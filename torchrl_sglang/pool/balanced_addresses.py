"""Finds addresses that lead to one of several servers, another one for each connection."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import partial
from urllib.parse import urlsplit

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ConfigError, SGLangError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool.checks import process_mark

__all__ = ["refuse_balanced_address", "refuse_balanced_addresses"]

_CONNECTIONS = 3
"""Of two servers in turn, the second one shows; of several by chance, one in ten addresses is missed."""


def refuse_balanced_addresses(clients: Sequence[SGLangClient]) -> None:
    """:func:`refuse_balanced_address` for each that is on another machine, side by side."""
    remote = [client for client in clients if not _is_loopback(client.url)]
    for outcome in side_by_side({each.url: partial(refuse_balanced_address, each) for each in remote}).values():
        outcome.unwrap()


def refuse_balanced_address(client: SGLangClient) -> None:
    """Require that each connection to an address leads to the same process. A server that does not answer passes.

    Args:
        client: has read what the server says of itself.

    Raises:
        ConfigError: two processes have answered.
    """
    mark = process_mark(client.info.raw)
    if mark is None:
        return
    for _ in range(_CONNECTIONS):
        another = SGLangClient(client.url, client.config)
        try:
            differs = process_mark(another.connect().raw) != mark
        except ConfigError:
            raise
        except SGLangError:
            return
        finally:
            another.close()
        if differs:
            raise ConfigError(
                f"{client.url} leads to several servers: another process answered a second connection. A weight "
                "update would reach one of them at a time. Give the address of each server; of a Kubernetes service, "
                "make it headless and use engine.follow('dns://name:port')"
            )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
