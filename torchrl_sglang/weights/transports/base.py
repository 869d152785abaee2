"""The interface of a transport: how weights get from the trainer to the servers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import WeightUpdateError
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.buckets.packing import BucketPacker, PackedBuckets
from torchrl_sglang.weights.buckets.value_check import ValueCheck
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["PackedWeights", "TransportSession", "WeightTransport"]

PackedBucket = tuple[Bucket, torch.Tensor]
"""A bucket and its bytes: uint8, ``(bucket.nbytes,)``."""


class PackedWeights(Iterator[PackedBucket]):
    """Buckets with their bytes. Each is packed on demand, or all are in advance, and counted in the report.

    The bytes of a bucket that is packed on demand stay valid until the bucket after the next is asked for.

    Args:
        buckets: packs the buckets (:meth:`BucketPacker.packed`).
        report: counts buckets, tensors and bytes.
        num_buckets: how many will come, if that is known.
        peft_config: the adapter's configuration, when the weights are an adapter.
        on_packed: called with every bucket and its bytes, as soon as they are packed.
        is_sharded: other ranks gather every tensor with this one, also if nothing is taken.
        is_staged: pack all buckets in advance (:meth:`stage`); each has a buffer of its own.
        values: collects what is wrong with the values that are packed; ``None`` if they are not checked then.
    """

    def __init__(
        self,
        buckets: PackedBuckets,
        report: SyncReport,
        *,
        num_buckets: int | None,
        peft_config: Any = None,
        on_packed: Callable[[Bucket, torch.Tensor], None] | None = None,
        is_sharded: bool = False,
        is_staged: bool = False,
        values: ValueCheck | None = None,
    ) -> None:
        self.num_buckets = num_buckets
        self.peft_config = peft_config
        self._buckets = buckets
        self._report = report
        self._on_packed = on_packed
        self._is_staged = is_staged
        self._values = values
        self._ready: deque[PackedBucket] = deque()
        self._others_wait = is_sharded

    def stage(self) -> None:
        """Pack, while the servers still generate, what can be: all buckets, or the first.

        Raises:
            WeightCoverageError: a tensor holds values that no server should get.
        """
        while (self._is_staged or not self._ready) and (packed := self._pack_next()) is not None:
            self._ready.append(packed)
        if self._is_staged:
            self.num_buckets = len(self._ready)
        if self._values is not None:
            self._values.raise_if_any()

    def __next__(self) -> PackedBucket:
        packed = self._ready.popleft() if self._ready else self._pack_next()
        if packed is None:
            raise StopIteration
        self._report.num_buckets += 1
        self._report.num_tensors += len(packed[0].slots)
        self._report.num_bytes += packed[0].nbytes
        return packed

    def _pack_next(self) -> PackedBucket | None:
        self._others_wait = False
        packed = next(self._buckets, None)
        if packed is not None and self._on_packed is not None:
            self._on_packed(*packed)
        return packed

    def close(self) -> None:
        """Pack no more buckets; releases the other ranks of a sharded source."""
        if self._others_wait:  # a generator that has not begun would end without its gathers
            self._pack_next()
        self._buckets.close()


class TransportSession(Protocol):
    """A ``with`` block around one update, used once. Without an error its end finishes the update on every server."""

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that verification has to use."""

    def __enter__(self) -> TransportSession: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def reject(self, error: WeightUpdateError) -> None:
        """Verification failed after the update: undo it, or take the servers named by ``error`` out of service."""


Session = TypeVar("Session", bound=TransportSession)


class WeightTransport(Protocol[Session]):
    """How weights get from the trainer to the servers.

    The steps of one update, in order::

        transport.connect(clients)
        packed = PackedWeights(transport.packer.packed(plan, source.tensors), report, ...)
        transport.stage(packed, version, report)
        with transport.open_session(clients, version, deadline, report) as session:
            transport.send(session, packed, deadline)
    """

    @property
    def name(self) -> str:
        """What the report calls it; ``auto`` is called after what it has chosen."""

    @property
    def packer(self) -> BucketPacker:
        """Packs buckets on the device that this transport sends from; available after :meth:`connect`."""

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Prepare what does not depend on the weights.

        Raises:
            ConfigError: a server can't take weights by this transport.
            WeightUpdateError: a server did not take part.
        """

    def stage(self, packed: PackedWeights, version: WeightVersion, report: SyncReport) -> None:
        """Do what can be done while the servers still generate.

        Raises:
            WeightCoverageError: a tensor holds values that no server should get.
        """

    def open_session(
        self, clients: Sequence[SGLangClient], version: WeightVersion, deadline: float, report: SyncReport
    ) -> Session:
        """The ``with`` block in which :meth:`send` runs.

        Args:
            clients: the servers.
            version: what the weights are called.
            deadline: ``time.monotonic()`` value by which everything has to be done.
            report: records phases and pauses.

        Raises:
            ConfigError: a server can't take part.
        """

    def send(self, session: Session, packed: PackedWeights, deadline: float) -> None:
        """Put the weights on the servers.

        Raises:
            WeightUpdateError: a server refused, died or hung.
        """

    def close(self) -> None:
        """Destroy what :meth:`connect` has made."""
