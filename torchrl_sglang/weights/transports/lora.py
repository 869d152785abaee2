"""Transport ``lora``: only the adapter is sent, under a name per version, and requests switch to it.

Nothing is paused: a request under way keeps the adapter that it began with, and new requests use the new one. The
servers keep the two newest adapters. The trainer's base model must be the one that the servers loaded.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import RequestRejectedError, SGLangError, WeightUpdateError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import Adapter, SGLangPool
from torchrl_sglang.protocol.control import build_load_lora_from_tensors, build_unload_lora, check_success
from torchrl_sglang.protocol.messages import HttpRequest, ServerInfo
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.transports.base import PackedWeights
from torchrl_sglang.weights.transports.lora_limits import require_fitting_servers, require_lora
from torchrl_sglang.weights.transports.tensor_payload import encode_tensors
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["AdapterSession", "LoraTransport"]

_log = logging.getLogger(__name__)

_KEPT_VERSIONS = 2
"""Requests under way may still use the previous adapter."""


class LoraTransport:
    """Sends a PEFT model's active adapter to servers launched with ``--enable-lora``.

    Args:
        pool: the servers; its state names the adapter that requests use.
        owner: id of this trainer, part of the adapters' names: two trainers use different ones.
        checkpoint: what the servers were started from.
    """

    name = "lora"

    def __init__(self, pool: SGLangPool, owner: str, checkpoint: Checkpoint) -> None:
        self._pool = pool
        self._owner = owner
        self._has_experts = checkpoint.has_experts
        self._loaded: list[str] = []
        self._num_sent: Counter[int] = Counter()  # by version number
        self._infos: Sequence[ServerInfo] = ()
        self._sent: dict[str, tuple[bytes, dict[str, object]]] = {}

    @property
    def packer(self) -> BucketPacker:
        """Packs the adapter in main memory, in one bucket."""
        return BucketPacker("cpu")

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Check that the servers take adapters.

        Raises:
            ConfigError: a server was started without LoRA, or in a way in which SGLang can't use adapters.
        """
        for client in clients:
            require_lora(client.info, has_experts=self._has_experts)
        self._infos = [client.info for client in clients]

    def stage(self, packed: PackedWeights, version: WeightVersion, report: SyncReport) -> None:
        """Pack the adapter and compare it with the flags that the servers were started with.

        Raises:
            ConfigError: its rank or its modules are more than a server takes.
        """
        require_fitting_servers(packed.peft_config, self._infos)
        packed.stage()

    def open_session(
        self, clients: Sequence[SGLangClient], version: WeightVersion, deadline: float, report: SyncReport
    ) -> AdapterSession:
        """Pauses nothing. See :meth:`WeightTransport.open_session`."""
        name = f"torchrl-{self._owner}-{version.number}"
        self._num_sent[version.number] += 1
        if self._num_sent[version.number] > 1:  # a server refuses a name that it has, and requests may use the first
            name = f"{name}.{self._num_sent[version.number]}"
        return AdapterSession(self._pool, clients, Adapter(name=name, version=str(version)), report, self._loaded)

    def send(self, session: AdapterSession, packed: PackedWeights, deadline: float) -> None:
        """Load the adapter on every server. See :meth:`WeightTransport.send`."""
        tensors = {
            name: view for bucket, flat in packed for name, view in zip(bucket.names, bucket.views(flat), strict=True)
        }
        sent = encode_tensors(tensors), packed.peft_config
        self._sent = {name: self._sent[name] for name in self._loaded if name in self._sent} | {session.adapter: sent}
        session.load(*sent, deadline)

    def load_again(self, clients: Sequence[SGLangClient], deadline: float) -> None:
        """Load the adapters that requests use, or may still use, on servers that have just joined.

        Raises:
            ConfigError: a server can't take them.
            SGLangError: a server did not take them.
        """
        for client in clients:
            require_lora(client.info, has_experts=self._has_experts)
        kept = [(name, *self._sent[name]) for name in self._loaded]
        for _, _, peft_config in kept:
            require_fitting_servers(peft_config, [client.info for client in clients])

        def load(client: SGLangClient) -> None:
            for name, payload, peft_config in kept:
                request = build_load_lora_from_tensors(name, peft_config, [payload] * client.info.tp_size)
                try:
                    _load(client, request, deadline)
                except RequestRejectedError as error:
                    if "already loaded" not in error.detail:  # it was a member when that was sent; names are unique
                        raise

        for outcome in side_by_side({client.url: partial(load, client) for client in clients}).values():
            outcome.unwrap()
        for client in clients:
            self._pool.state.adapter_loaded(client.url)

    def close(self) -> None:
        """The adapters stay loaded: requests use them."""


class AdapterSession:
    """A ``with`` block around one adapter update; used once.

    Leaving it without an error makes requests use the new adapter. After an error all servers continue with the
    previous one.

    Args:
        pool: the servers.
        clients: the servers that get the adapter.
        adapter: its name and version.
        report: records phases.
        loaded: names of the adapters of earlier updates that are still loaded, oldest first; kept up to date.

    Attributes:
        adapter: the adapter's name, to verify the update with.
    """

    def __init__(
        self,
        pool: SGLangPool,
        clients: Sequence[SGLangClient],
        adapter: Adapter,
        report: SyncReport,
        loaded: list[str],
    ) -> None:
        self.adapter = adapter.name
        self._pool = pool
        self._clients = tuple(clients)
        self._new = adapter
        self._before = pool.state.weights.adapter
        self._report = report
        self._loaded = loaded

    def __enter__(self) -> AdapterSession:
        for client in self._clients:
            self._pool.state.update_started(client.url)
        # The number is used up even if loading fails.
        self._pool.state.version_claimed(WeightVersion.parse(self._new.version).number)
        return self

    def load(self, payload: bytes, config: dict[str, object], deadline: float) -> None:
        """Load the adapter on every server.

        Raises:
            WeightUpdateError: a server refused it.
        """

        def request(client: SGLangClient) -> HttpRequest:
            return build_load_lora_from_tensors(self._new.name, config, [payload] * client.info.tp_size)

        with self._report.phase("transfer"):
            calls = {each.url: partial(_load, each, request(each), deadline) for each in self._clients}
            outcomes = side_by_side(calls)
        failed = {url: outcome.error for url, outcome in outcomes.items() if outcome.error is not None}
        if failed:
            url, error = next(iter(failed.items()))
            raise WeightUpdateError(
                f"{url} did not take the adapter: {error}.\nAll servers continue with the previous adapter",
                server_weights={client.url: "old" for client in self._clients},
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._unload(self._new.name)
            for client in self._clients:
                self._pool.state.update_abandoned(client.url)
            return
        self._pool.state.adapter_switched(self._new)
        for client in self._clients:
            self._pool.state.adapter_loaded(client.url)
        self._loaded.append(self._new.name)
        while len(self._loaded) > _KEPT_VERSIONS:
            self._unload(self._loaded.pop(0))

    def reject(self, error: WeightUpdateError) -> None:
        """Verification failed after the update: requests use the previous adapter again."""
        self._pool.state.adapter_switched(self._before)
        self._loaded.remove(self._new.name)
        self._unload(self._new.name)

    def _unload(self, name: str) -> None:
        """Remove an adapter where it is loaded. A server that never had it refuses, which is no error."""

        def unload(client: SGLangClient) -> Callable[[], None]:
            def call() -> None:
                try:
                    client.send(build_unload_lora(name))
                except SGLangError as error:
                    _log.debug("%s could not unload adapter %s: %s", client.url, name, error)

            return call

        side_by_side({client.url: unload(client) for client in self._clients})


def _load(client: SGLangClient, request: HttpRequest, deadline: float) -> None:
    timeout_s = max(0.05, deadline - time.monotonic())
    check_success(client.send(request, timeout_s=timeout_s), server=client.url, what="the adapter")
