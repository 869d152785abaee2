"""Weights for servers that join a pool between two pushes: those of the last push, while the other servers generate."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.errors import ConfigError, ProtocolError, RequestRejectedError, WeightUpdateError
from torchrl_sglang.parallel import side_by_side
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.checksums import RankChecksums, build_checksums, parse_checksums
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.planning import PushPlanner
from torchrl_sglang.weights.transports.base import PackedWeights, WeightTransport
from torchrl_sglang.weights.transports.lora import LoraTransport
from torchrl_sglang.weights.transports.staging import bucket_bytes
from torchrl_sglang.weights.update.report import SyncReport
from torchrl_sglang.weights.update.session import UpdateSession

__all__ = ["NewcomerUpdates", "fingerprint"]

_log = logging.getLogger(__name__)

_MAX_LISTED = 5


class NewcomerUpdates:
    """Brings newcomers up to date; used by one :class:`WeightSync`, under the pool's update lock.

    Args:
        pool: the servers, the newcomers among them.
        planner: plans what is sent.
        config: deadlines.
        owner: id of this trainer.
    """

    def __init__(self, pool: SGLangPool, planner: PushPlanner, config: SyncConfig, owner: str) -> None:
        self._pool = pool
        self._planner = planner
        self._config = config
        self._owner = owner
        self._last: tuple[Any, WeightVersion, object] | None = None

    def remember(self, weights: Any, version: WeightVersion) -> None:
        """A push has sent these weights under this version."""
        state = fingerprint(weights)
        self._last = None if state is None else (weights, version, state)

    def forget(self) -> None:
        """The last push did not succeed, or can't be repeated."""
        self._last = None

    def update(self, clients: Sequence[SGLangClient], transport: WeightTransport[Any]) -> list[SGLangClient]:
        """See :meth:`WeightSync.bring_up_to_date`."""
        if isinstance(transport, LoraTransport):
            return self._load_adapter(clients, transport)
        saved = self._pool.state.weights.saved
        if saved is not None and saved.version.number == self._pool.state.weights.version:
            deadline = time.monotonic() + self._config.deadline_s(self._planner.checkpoint.nbytes)
            report = SyncReport(version=saved.version.number, transport=transport.name)
            transport.connect(clients)
            session = transport.open_session(clients, saved.version, deadline, report)
            session.is_joining = True
            with session:
                session.load_from_disk(saved.path)
            return self._serve(clients, session, saved.version)
        return self._send_again(clients, transport)

    # ------------------------------------------------------------------ the transports

    def _load_adapter(self, clients: Sequence[SGLangClient], transport: LoraTransport) -> list[SGLangClient]:
        self._require_same_base(clients)
        if self._pool.state.weights.adapter is None:
            return list(clients)
        transport.load_again(clients, time.monotonic() + self._config.deadline_s(0))
        for client in clients:
            self._pool.restore(client.url, based_on=self._pool.state.server(client.url))
        return []

    def _require_same_base(self, clients: Sequence[SGLangClient]) -> None:
        """An adapter changes a base model: newcomers must hold that of the others.

        Raises:
            ConfigError: one holds another version.
        """
        others = [client for client in self._pool.healthy if client not in clients]
        outcomes = side_by_side({client.url: client.weight_version for client in (*clients, *others)})
        bases = {outcomes[client.url].value for client in others} - {None}
        for client in clients:
            held = outcomes[client.url].unwrap()
            if bases and held not in bases:
                others_hold = ", ".join(sorted(map(str, bases)))
                raise ConfigError(
                    f"{client.url} holds base weights of version {held!r}, and the other servers {others_hold!r}: an "
                    "adapter needs the same base model everywhere. Restart it from the checkpoint of the others"
                )

    def _send_again(self, clients: Sequence[SGLangClient], transport: WeightTransport[Any]) -> list[SGLangClient]:
        """Send the tensors of the last push once more, if the trainer still has them."""
        if self._last is None:
            return list(clients)
        weights, version, state = self._last
        if version.number != self._pool.state.weights.version or fingerprint(weights) != state:
            return list(clients)  # the trainer has made other weights of them since
        report = SyncReport(version=version.number, transport=transport.name)
        packed: PackedWeights | None = None
        try:
            transport.connect(clients)
            source = self._planner.open_source(weights)
            size = bucket_bytes(self._config, transport, self._planner.checkpoint.nbytes)
            plan = self._planner.plan(source, partial=False, transport=transport.name, bucket_bytes=size)
            packed = self._planner.pack(source, plan, transport.packer, report, bucket_bytes=size)
            deadline = time.monotonic() + self._config.deadline_s(sum(bucket.nbytes for bucket in plan))
            transport.stage(packed, version, report)
            session = transport.open_session(clients, version, deadline, report)
            session.is_joining = True
            with session:
                transport.send(session, packed, deadline)
            return self._serve(clients, session, version, is_torn=fingerprint(weights) != state)
        except BaseException:
            transport.close()
            raise
        finally:
            if packed is not None:
                packed.close()

    # ------------------------------------------------------------------ afterwards

    def _serve(
        self, clients: Sequence[SGLangClient], session: UpdateSession, version: WeightVersion, *, is_torn: bool = False
    ) -> list[SGLangClient]:
        """Route requests to the newcomers that hold what the others hold; returns the rest.

        ``is_torn`` says that the trainer has changed its tensors while they were sent.
        """
        pool = self._pool
        found = {client.url: pool.state.server(client.url) for client in clients}
        complaints = _torn(clients) if is_torn else self._compare(clients, version)
        if complaints:
            session.reject(
                WeightUpdateError("; ".join(complaints.values()), server_weights=dict.fromkeys(complaints, "mixed"))
            )
        for client in clients:
            pool.state.verification_ended(client.url)
            if client.url in complaints:
                _log.warning("%s", complaints[client.url])
            else:
                pool.restore(client.url, based_on=found[client.url])
        return [client for client in clients if client.url in complaints]

    def _compare(self, clients: Sequence[SGLangClient], version: WeightVersion) -> dict[str, str]:
        """Compare the checksums of all tensors with those of another server that holds this version.

        The trainer may have changed a tensor while it was sent, and nothing else shows it.
        """
        state = self._pool.state
        peers = [each for each in self._pool.healthy if state.server(each.url).version == str(version)]
        pairs: dict[str, SGLangClient] = {}
        for client in clients:
            peer = next((each for each in peers if _kind(each) == _kind(client)), None)
            if peer is not None:
                pairs[client.url] = peer
        asked = {client.url: client for client in (*clients, *pairs.values()) if client.url in pairs or client in peers}
        outcomes = side_by_side({url: partial(_checksums, client) for url, client in asked.items()}) if asked else {}
        complaints = {}
        for url, peer in pairs.items():
            ours, theirs = outcomes[url], outcomes[peer.url]
            if isinstance(ours.error, (RequestRejectedError, ProtocolError)) or theirs.error is not None:
                continue  # without checksums, the time stamps of the trainer's tensors have to do
            different = _different(ours.unwrap(), theirs.unwrap())
            if different:
                listed = ", ".join(different[:_MAX_LISTED])
                complaints[url] = (
                    f"{url} got other weights than {peer.url} holds, for example {listed}: the trainer has changed its "
                    "tensors. The next weight update brings new ones"
                )
        return complaints


def _torn(clients: Sequence[SGLangClient]) -> dict[str, str]:
    """What is wrong with servers that got tensors of two steps of the trainer."""
    advice = "the trainer has changed its tensors while they were sent. The next weight update brings new ones"
    return {client.url: f"{client.url} can't be used: {advice}" for client in clients}


def fingerprint(weights: Any) -> object | None:
    """A value that changes when a trainer changes its tensors in place or replaces them.

    A change behind autograd's back (``tensor.data.add_(1)``) does not show.

    Returns:
        ``None`` for weights of which that can't be said, or which one rank alone can't read: iterators, sharded
        tensors, folders.

    Examples:
        >>> weights = {"a": torch.zeros(2)}
        >>> before = fingerprint(weights)
        >>> fingerprint(weights) == before
        True
        >>> _ = weights["a"].add_(1)
        >>> fingerprint(weights) == before
        False
    """
    tensors = list(_tensors(weights))
    if not tensors or any(hasattr(tensor, "device_mesh") or tensor.is_inference() for tensor in tensors):
        return None
    return [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]


def _tensors(weights: Any) -> Iterator[torch.Tensor]:
    if isinstance(weights, nn.Module):
        yield from weights.parameters()
        yield from weights.buffers()
    elif isinstance(weights, TensorDictBase):
        for _, value in weights.items(include_nested=True, leaves_only=True):
            yield from _tensors(value)
    elif isinstance(weights, Mapping):
        for value in weights.values():
            yield from _tensors(value)
    elif isinstance(weights, torch.Tensor):
        yield weights


def _kind(client: SGLangClient) -> tuple[object, ...]:
    """What decides how a server holds its tensors."""
    info = client.info
    return info.version, info.tp_size, info.dtype, info.device, info.quantization


def _checksums(client: SGLangClient) -> list[RankChecksums]:
    return parse_checksums(client.send(build_checksums()), server=client.url)


def _different(ours: Sequence[RankChecksums], theirs: Sequence[RankChecksums]) -> list[str]:
    """Names of the tensors whose checksums differ on some rank."""
    if len(ours) != len(theirs):
        return ["the number of ranks"]
    return sorted(
        {
            name
            for one, other in zip(ours, theirs, strict=True)
            for name in one.hashes.keys() | other.hashes.keys()
            if one.hashes.get(name) != other.hashes.get(name)
        }
    )
