"""Sends buckets to servers as requests that carry their tensors, or say where these lie; no rank waits for another."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import (
    RequestRejectedError,
    ServerTimeoutError,
    ServerWeights,
    SGLangError,
    WeightUpdateError,
)
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import PoolState
from torchrl_sglang.protocol.control import build_update_from_tensors, check_success
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.transports.base import PackedWeights
from torchrl_sglang.weights.update.session import UpdateSession

__all__ = ["BucketPayloads", "TensorLoop", "send_tensors"]

_NOTHING_LOADED = "must run between begin_weight_update"
"""SGLang's message for a refusal before it reads anything."""


class BucketPayloads(Protocol):
    """Makes the payloads of buckets, and learns when a bucket's memory is no longer used."""

    def sending(self, bucket: Bucket, flat: torch.Tensor, clients: Sequence[SGLangClient]) -> Mapping[str, list[bytes]]:
        """Payloads per server URL, one for each of its ranks. These servers are about to be told."""

    def answered(self, flat: torch.Tensor) -> None:
        """Every server that was told of this bucket has answered."""


class TensorLoop:
    """Sends packed buckets to all servers. While they load one, the next one is packed and sent.

    A server that fails drops out, and the others go on.

    Args:
        clients: the servers.
        state: the pool's state: from its first request on a server holds mixed weights.
        payloads: what is sent of a bucket.
        config: time-outs.
        deadline: ``time.monotonic()`` value by which everything has to have arrived.

    Attributes:
        failed: servers that dropped out, and why.
    """

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        state: PoolState,
        payloads: BucketPayloads,
        config: SyncConfig,
        deadline: float,
    ) -> None:
        self._clients = list(clients)
        self._state = state
        self._payloads = payloads
        self._config = config
        self._deadline = deadline
        self.failed: dict[str, SGLangError] = {}
        self._weights_before: dict[str, ServerWeights] = {}
        self._done: queue.SimpleQueue[Task[Any]] = queue.SimpleQueue()
        self._waiting: dict[Task[Any], tuple[SGLangClient, int]] = {}
        self._flats: dict[int, torch.Tensor] = {}
        self._has_silent = False

    def run(
        self, packed: Iterator[tuple[Bucket, torch.Tensor]], *, num_buckets: int | None, flush_cache: bool
    ) -> Mapping[str, SGLangError]:
        """Send every bucket.

        Args:
            packed: pairs of a bucket and its bytes (uint8, ``(bucket.nbytes,)``). The loop asks for a bucket when all
                servers have answered to the one before the last.
            num_buckets: how many will come, if that is known.
            flush_cache: empty the prefix caches with the last bucket (needs ``num_buckets``).

        Returns:
            Servers that dropped out while others went on, and why.

        Raises:
            WeightUpdateError: no server is left; names the last one that failed.
        """
        number = 0
        for bucket, flat in packed:
            number += 1
            self._send(number, bucket, flat, flush_cache=flush_cache and number == num_buckets)
            self._await(number - 1)
            if not self._clients:
                break
        self._await(number)
        if not self._clients:
            raise next(reversed(self.failed.values()))
        return self.failed

    def _send(self, number: int, bucket: Bucket, flat: torch.Tensor, *, flush_cache: bool) -> None:
        self._flats[number] = flat
        payloads = self._payloads.sending(bucket, flat, self._clients)
        for client in self._clients:
            self._weights_before.setdefault(client.url, self._state.server(client.url).weights)
            self._state.weights_changed(client.url, "mixed")
            request = build_update_from_tensors(payloads[client.url], flush_cache=flush_cache)
            timeout_s = min(self._config.bucket_timeout_s, self._remaining())
            call: Callable[[], None] = partial(_send_request, client, request, timeout_s)
            task = Task(call, name=f"sglang-{client.url}", on_done=self._done.put)
            self._waiting[task] = (client, number)

    def _await(self, number: int) -> None:
        """Wait until every server has answered to the buckets up to ``number``."""
        while any(of_bucket <= number for _, of_bucket in self._waiting.values()):
            try:
                task = self._done.get(timeout=self._remaining())
            except queue.Empty:
                silent = {client.url for client, _ in self._waiting.values()}
                self._waiting.clear()
                self._flats.clear()
                for url in silent:
                    self._drop_out(url, ServerTimeoutError("no answer in time"))
                continue
            client, of_bucket = self._waiting.pop(task, (None, 0))
            if client is None:
                continue
            error = task.outcome().error
            if error is not None:
                self._drop_out(client.url, error)
            if not any(other == of_bucket for _, other in self._waiting.values()):
                flat = self._flats.pop(of_bucket)
                if not self._has_silent:
                    self._payloads.answered(flat)

    def _drop_out(self, url: str, error: SGLangError) -> None:
        """Go on without a server that failed."""
        self._has_silent = self._has_silent or not isinstance(error, RequestRejectedError)
        if url in self.failed:
            return
        if isinstance(error, RequestRejectedError) and _NOTHING_LOADED in error.detail:
            self._state.weights_changed(url, self._weights_before[url])
        self.failed[url] = WeightUpdateError(f"{url} failed while receiving weights: {error}")
        self._clients = [client for client in self._clients if client.url != url]

    def _remaining(self) -> float:
        return max(0.05, self._deadline - time.monotonic())


def send_tensors(session: UpdateSession, loop: TensorLoop, packed: PackedWeights) -> None:
    """Open the update session on the servers and send them all buckets.

    Raises:
        WeightUpdateError: no server has received them.
    """
    session.begin()
    flush = session.flushes and packed.num_buckets is not None
    with session.report.phase("transfer"):
        failed = loop.run(packed, num_buckets=packed.num_buckets, flush_cache=flush)
    session.received(flushed=flush and session.report.num_buckets > 0, failed=failed)


def _send_request(client: SGLangClient, request: Any, timeout_s: float) -> None:
    check_success(client.send(request, timeout_s=timeout_s), server=client.url, what="a bucket of weights")
