"""HTTP client of an sglang-router: generation goes through it, and it is told which servers may serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import replace

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import RequestRejectedError, ServerTimeoutError, SGLangError
from torchrl_sglang.protocol.router import (
    build_add_worker,
    build_list_workers,
    build_readiness,
    build_remove_worker,
    parse_workers,
)

__all__ = ["MAX_REQUESTS", "RouterClient"]

_log = logging.getLogger(__name__)

MAX_REQUESTS = 256
"""Most requests that a batch is divided into. The router balances requests, not sequences, so it gets many."""
_POLL_S = 0.05
_JOIN_TIMEOUT_S = 30.0
"""The router checks a new worker's health and model before it admits it: milliseconds, unless the worker is busy."""


class RouterClient:
    """Talks to a running router. Thread-safe; pickles like a client.

    Args:
        url: its base URL.
        config: time-outs and keys; the router passes the servers' key of a generate request on to them.

    Attributes:
        client: the client for generate requests.
    """

    def __init__(self, url: str, config: ClientConfig) -> None:
        self.client = SGLangClient(url, replace(config, max_connections=MAX_REQUESTS))

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
        """Make these servers its workers, and wait until it has admitted them.

        Raises:
            ServerTimeoutError: it did not admit them.
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
                    f"the router at {self.url} did not admit {', '.join(sorted(missing))} within "
                    f"{_JOIN_TIMEOUT_S:.0f} s; can it reach them? Its log says more",
                    server=self.url,
                )
            time.sleep(_POLL_S)
        while not self._is_ready():
            if time.monotonic() > deadline:
                raise ServerTimeoutError(f"the router at {self.url} has workers and is not ready", server=self.url)
            time.sleep(_POLL_S)

    def leave(self, url: str) -> None:
        """Remove a server from its workers.

        A router that does not answer is logged and is no error here: the next request through it fails.
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
            _log.warning("the router at %s could not be told to remove %s: %s", self.url, url, error)

    def _is_ready(self) -> bool:
        try:
            self.client.send(build_readiness())
        except RequestRejectedError:
            return False
        return True

    def close(self) -> None:
        """Close idle connections."""
        self.client.close()
