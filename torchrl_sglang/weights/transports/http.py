"""Transport ``http``: the buckets travel in the requests, to servers that no collective reaches.

For attached servers behind NAT, a Kubernetes ingress or in another cloud: it needs the server's HTTP port alone, also
through TLS and with API keys, and no rank waits for the trainer. A request is a third larger than its bucket (base64),
and holds it once for each tensor-parallel rank. SGLang reads neither compressed requests nor compressed tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SyncConfig
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.transports.base import PackedWeights
from torchrl_sglang.weights.transports.replicas import require_one_replica
from torchrl_sglang.weights.transports.tensor_loop import TensorLoop, send_tensors
from torchrl_sglang.weights.transports.tensor_payload import by_value
from torchrl_sglang.weights.update.report import SyncReport
from torchrl_sglang.weights.update.session import UpdateSession

__all__ = ["HttpTransport"]


class HttpTransport:
    """Sends weights in the requests' bodies.

    Args:
        pool: the servers.
        config: bucket size and time-outs.
    """

    name = "http"

    def __init__(self, pool: SGLangPool, config: SyncConfig) -> None:
        self._pool = pool
        self._config = config
        self._packer = BucketPacker("cpu")

    @property
    def packer(self) -> BucketPacker:
        """Packs buckets in main memory."""
        return self._packer

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Check that an update reaches every rank.

        Raises:
            ConfigError: a server has several replicas or pipeline stages inside.
        """
        require_one_replica(clients)

    def stage(self, packed: PackedWeights, version: WeightVersion, report: SyncReport) -> None:
        """Gather, check and pack all buckets, or the first."""
        packed.stage()

    def open_session(
        self, clients: Sequence[SGLangClient], version: WeightVersion, deadline: float, report: SyncReport
    ) -> UpdateSession:
        """Pauses the servers. See :meth:`WeightTransport.open_session`."""
        return UpdateSession(
            self._pool, clients, version=version, config=self._config, deadline=deadline, report=report
        )

    def send(self, session: UpdateSession, packed: PackedWeights, deadline: float) -> None:
        """Send the buckets. See :meth:`WeightTransport.send`."""
        loop = TensorLoop(session.clients, self._pool.state, self, self._config, deadline)
        send_tensors(session, loop, packed)

    def sending(self, bucket: Bucket, flat: torch.Tensor, clients: Sequence[SGLangClient]) -> Mapping[str, list[bytes]]:
        """See :class:`~torchrl_sglang.weights.transports.tensor_loop.BucketPayloads`."""
        payload = by_value(bucket, flat)
        return {client.url: [payload] * client.info.tp_size for client in clients}

    def answered(self, flat: torch.Tensor) -> None:
        """Nothing to do: the request had a copy."""

    def close(self) -> None:
        """Free the buffers."""
        self._packer.release()
