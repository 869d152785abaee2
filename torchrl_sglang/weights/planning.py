"""What a push sends: opens the source, checks it against the checkpoint, lays out buckets and packs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from torchrl_sglang.config import SyncConfig
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.buckets.layout import Bucket, plan_buckets, trainable_specs
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.buckets.value_check import ValueCheck
from torchrl_sglang.weights.checkpoint.coverage import check_coverage
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.checkpoint.wire_dtype import wire_dtype
from torchrl_sglang.weights.source.adapter import AdapterSource
from torchrl_sglang.weights.source.architecture import architecture_of, naming_architectures
from torchrl_sglang.weights.source.factory import open_source
from torchrl_sglang.weights.source.interface import WeightSource
from torchrl_sglang.weights.source.shards import together
from torchrl_sglang.weights.transports.base import PackedWeights
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["PushPlanner"]


class PushPlanner:
    """Plans pushes to the servers of one pool.

    Args:
        pool: the servers.
        config: names to ignore, bucket size, whether values are checked.
        owner: id of this trainer.
        checkpoint: what the servers were started from; read from the served path when it is first needed if ``None``.
    """

    def __init__(self, pool: SGLangPool, config: SyncConfig, owner: str, checkpoint: Checkpoint | None) -> None:
        self._pool = pool
        self._config = config
        self._owner = owner
        self._checkpoint = checkpoint

    @property
    def checkpoint(self) -> Checkpoint:
        """What the servers were started from.

        Raises:
            ConfigError: it can't be read from this machine.
        """
        if self._checkpoint is None:
            self._checkpoint = Checkpoint.read(self._pool.info.model_path, revision=self._pool.info.revision)
        return self._checkpoint

    @property
    def known_checkpoint(self) -> Checkpoint | None:
        """:attr:`checkpoint` if it was read or given."""
        return self._checkpoint

    @property
    def known_nbytes(self) -> int:
        """Bytes of the checkpoint; 0 before it was read."""
        return 0 if self._checkpoint is None else self._checkpoint.nbytes

    @property
    def served_dtype(self) -> torch.dtype | None:
        """What the servers compute in."""
        dtype = getattr(torch, self._pool.info.dtype, None)
        return dtype if isinstance(dtype, torch.dtype) else self.checkpoint.dtype

    @property
    def _served_architectures(self) -> tuple[str, ...]:
        return tuple(self.checkpoint.config.get("architectures") or self._pool.info.architectures)

    def open_source(self, weights: Any) -> WeightSource:
        """The trainer's weights as named tensors: its adapter for ``transport="lora"``, else the whole model.

        Raises:
            ConfigError: weights of an unknown kind.
        """
        if self._config.transport == "lora":
            return AdapterSource(weights, self.checkpoint, self.served_dtype)
        architecture = architecture_of(weights)
        with naming_architectures(architecture, self._served_architectures):
            source = open_source(weights, self.checkpoint, name_map=self._config.name_map, ignore=self._config.ignore)
        source.architecture = architecture
        return source

    def plan(self, source: WeightSource, *, partial: bool, transport: str, bucket_bytes: int) -> list[Bucket]:
        """Decide which tensors travel in which bucket. Everything that can be wrong with them is found here.

        Args:
            source: the trainer's weights.
            partial: names that are missing are no error.
            transport: name of the transport; a checkpoint on disk is always complete.
            bucket_bytes: most bytes per bucket.

        Returns:
            The buckets; none for a source that can be read only once, whose tensors are checked while they are packed.

        Raises:
            WeightCoverageError: names or shapes don't match.
        """
        if source.one_shot:
            return []
        if isinstance(source, AdapterSource):
            return [Bucket.of(source.specs().values())]
        with together(source.ranks, "comparing its tensors with the checkpoint's"):
            wire = self._wire_specs(source, partial)
        if transport != "disk" and self._may_skip_frozen(source):
            wire = trainable_specs(wire)
        return plan_buckets(wire, bucket_bytes=bucket_bytes)

    def _wire_specs(self, source: WeightSource, partial: bool) -> list[TensorSpec]:
        """The tensors in the dtypes in which they are sent; not collective."""
        checkpoint, specs = self.checkpoint, source.specs()
        ignore = (*self._config.ignore, *source.omitted_names)
        if partial:
            ignore += tuple(name for name in checkpoint.specs if name not in specs)
        with naming_architectures(source.architecture, self._served_architectures):
            check_coverage(specs, checkpoint, ignore=ignore, server=self._pool.clients[0].url)
        return [replace(spec, dtype=wire_dtype(spec, checkpoint, self.served_dtype)) for spec in specs.values()]

    def check_values(self, source: WeightSource, plan: Sequence[Bucket], *, while_packing: bool) -> ValueCheck | None:
        """Refuse NaN and infinity before anything is sent.

        Args:
            source: the trainer's weights.
            plan: from :meth:`plan`.
            while_packing: everything is packed before anything is sent, so the values can be checked then, in the same
                pass over memory. Not those of a sharded source, about which all ranks must agree.

        Returns:
            What checks them while they are packed, if that is so.

        Raises:
            WeightCoverageError: a tensor has such values.
        """
        if isinstance(source, AdapterSource) or (source.one_shot and self._config.check_values):
            source.check_values(target=self.served_dtype)
        elif self._config.check_values:
            if while_packing and not source.is_sharded:
                return ValueCheck(self.served_dtype)
            source.check_values([name for bucket in plan for name in bucket.names], self.served_dtype)
        return None

    def num_bytes(self, plan: Sequence[Bucket]) -> int:
        """Bytes that will be sent; those of the checkpoint for a source that can be read only once."""
        return sum(bucket.nbytes for bucket in plan) or self.checkpoint.nbytes

    def pack(
        self,
        source: WeightSource,
        plan: Sequence[Bucket],
        packer: BucketPacker,
        report: SyncReport,
        on_packed: Callable[[Bucket, torch.Tensor], None] | None = None,
        *,
        bucket_bytes: int,
        is_staged: bool = False,
        values: ValueCheck | None = None,
    ) -> PackedWeights:
        """Buckets with their bytes, packed when the transport asks for them or when it stages them.

        Args:
            source: the trainer's weights.
            plan: from :meth:`plan`.
            packer: packs where the transport needs the bytes.
            report: counts what is packed.
            on_packed: called with every packed bucket and its bytes.
            bucket_bytes: most bytes per bucket, for a source that can be read only once.
            is_staged: all are packed before the first is sent.
            values: from :meth:`check_values`.
        """
        packer.is_staged = is_staged
        if not source.one_shot:
            return PackedWeights(
                packer.packed(plan, source.tensors, values),
                report,
                num_buckets=len(plan),
                peft_config=source.peft_config,
                on_packed=on_packed,
                is_sharded=source.is_sharded,
                is_staged=is_staged,
                values=values,
            )
        stream = packer.packed_stream(
            source.tensors(),
            bucket_bytes=bucket_bytes,
            dtype_of=lambda spec: wire_dtype(spec, self.checkpoint, self.served_dtype),
            expected=self.checkpoint.specs,
        )
        return PackedWeights(stream, report, num_buckets=None, on_packed=on_packed, is_staged=is_staged)

    def expected_plan(self, source: WeightSource, plan: Sequence[Bucket], bucket_bytes: int) -> Sequence[Bucket]:
        """:meth:`plan`'s buckets. A source that can be read only once is taken to have the checkpoint's tensors."""
        if not source.one_shot:
            return plan
        specs = self.checkpoint.specs.values()
        wire = [replace(spec, dtype=wire_dtype(spec, self.checkpoint, self.served_dtype)) for spec in specs]
        return plan_buckets(wire, bucket_bytes=bucket_bytes)

    def gather_only(self, source: WeightSource, plan: Sequence[Bucket]) -> None:
        """Gather, with the sending rank and in its order, the tensors that it sends: those of :meth:`plan`."""
        for _ in source.tensors([name for bucket in plan for name in bucket.names]):
            pass

    def _may_skip_frozen(self, source: WeightSource) -> bool:
        """Whether every server is known to hold this trainer's frozen tensors.

        Never for a sharded model: the ranks that help to gather don't learn of a server's failure, and all ranks must
        gather the same tensors.
        """
        if not self._config.only_trainable or source.is_sharded:
            return False
        servers = self._pool.state.servers.values()
        return all(server.is_routed and server.complete_from == self._owner for server in servers)
