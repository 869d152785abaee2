"""An sglang-router before the servers: generation goes through it, and it is told who may serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import replace

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import RequestRejectedError, ServerError, ServerTimeoutError, SGLangError
from torchrl_sglang.protocol.router import (
    build_add_worker,
    build_list_workers,
    build_readiness,
    build_remove_worker,
    parse_workers,
)

__all__ = ["MOST_REQUESTS", "RouterClient"]

_log = logging.getLogger(__name__)

MOST_REQUESTS = 256
"""Pieces that a batch is cut into at most. The router balances requests, whatever they hold, so it gets many."""
_POLL_S = 0.05
_JOIN_TIMEOUT_S = 30.0
"""It looks at a new worker's health and model before it takes it in: milliseconds, unless the worker is busy."""


class RouterClient:
    """The HTTP side of a router. Thread-safe, and picklable like a client.

    Args:
        url: its base URL.
        config: how to talk to it; requests for generation carry the servers' key, which the router hands on.

    Attributes:
        client: what requests for generation are sent with.
    """

    def __init__(self, url: str, config: ClientConfig) -> None:
        self.client = SGLangClient(url, replace(config, max_connections=MOST_REQUESTS))

    @property
    def url(self) -> str:
        """Base URL."""
        return self.client.url

    def workers(self) -> dict[str, str]:
        """Its workers by URL, with the router's ids.

        Raises:
            ServerUnreachableError: nothing listens there.
            ProtocolError: it is no router.
        """
        return parse_workers(self.client.send(build_list_workers()), router=self.url)

    def join(self, urls: Collection[str]) -> None:
        """Have it send requests to these servers, and wait until it does.

        Raises:
            ServerTimeoutError: it did not take them in.
        """
        new = set(urls) - self.workers().keys()
        if not new:
            return
        for url in new:
            self.client.send(build_add_worker(url))
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        while missing := set(urls) - self.workers().keys():
            if time.monotonic() > deadline:
                raise ServerTimeoutError(
                    f"the router at {self.url} did not take in {', '.join(sorted(missing))} within "
                    f"{_JOIN_TIMEOUT_S:.0f} s; can it reach them? Its log says more",
                    server=self.url,
                )
            time.sleep(_POLL_S)
        while not self._is_ready():
            if time.monotonic() > deadline:
                raise ServerTimeoutError(f"the router at {self.url} has workers and is not ready", server=self.url)
            time.sleep(_POLL_S)

    def leave(self, url: str) -> None:
        """Have it send nothing more to a server.

        A router that can't be told is no reason to fail what found the server unfit: the next request will.
        """
        try:
            worker = self.workers().get(url)
            if worker is None:
                return
            self.client.send(build_remove_worker(worker))
            deadline = time.monotonic() + _JOIN_TIMEOUT_S
            while url in self.workers() and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        except SGLangError as error:
            _log.warning("the router at %s could not be told that %s is out: %s", self.url, url, error)

    def _is_ready(self) -> bool:
        try:
            self.client.send(build_readiness())
        except RequestRejectedError:
            return False
        return True

    def close(self) -> None:
        """Close idle connections."""
        self.client.close()


def nobody_left(front: RouterClient, at_stake: str, error: SGLangError) -> ServerError:
    """The error when the router has no server to send to."""
    return ServerError(f"no server is left behind the router at {front.url}, {at_stake}. {error}", server=front.url)
