"""What will be sent, checked before anything is: names, shapes, dtypes, values; and in which buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from torchrl_sglang.config import SyncConfig
from torchrl_sglang.weights.buckets.layout import Bucket, plan_buckets, trainable_specs
from torchrl_sglang.weights.checkpoint.coverage import check_coverage
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.checkpoint.wire_dtype import wire_dtype
from torchrl_sglang.weights.source.interface import WeightSource
from torchrl_sglang.weights.transports.base import Packing

__all__ = ["gather_only", "make_packing", "make_plan"]


def make_plan(
    source: WeightSource,
    checkpoint: Checkpoint,
    config: SyncConfig,
    *,
    served_dtype: torch.dtype | None,
    server: str,
    partial: bool,
    skip_frozen: bool,
) -> list[Bucket]:
    """Which tensors travel in which bucket; everything that can be wrong with them is found here.

    Args:
        source: the trainer's weights.
        checkpoint: what the servers were started from.
        config: names to ignore, bucket size, whether values are looked at.
        served_dtype: what the servers compute in.
        server: URL for error messages.
        partial: names that are missing are not an error.
        skip_frozen: leave out tensors no optimiser changes.

    Returns:
        The buckets; none for a source that can be read only once, whose tensors are checked one by one as they pass.

    Raises:
        WeightCoverageError: names, shapes or values don't match.
    """
    if source.one_shot:
        if config.check_values:
            source.check_values(target=served_dtype)  # each tensor, when it comes
        return []
    specs = source.specs()
    ignore = (*config.ignore, *source.omitted_names)
    if partial:
        ignore += tuple(name for name in checkpoint.specs if name not in specs)
    check_coverage(specs, checkpoint, ignore=ignore, server=server)
    wire = [replace(spec, dtype=wire_dtype(spec, checkpoint, served_dtype)) for spec in specs.values()]
    if skip_frozen:
        wire = trainable_specs(wire)
    if config.check_values:
        source.check_values([spec.name for spec in wire], served_dtype)
    return plan_buckets(wire, bucket_bytes=config.bucket_bytes)


def make_packing(
    source: WeightSource,
    checkpoint: Checkpoint,
    config: SyncConfig,
    plan: list[Bucket],
    *,
    served_dtype: torch.dtype | None,
) -> Packing:
    """How a transport gets the buckets of a plan, each with its bytes, when it asks for them."""
    if not source.one_shot:
        return lambda packer: packer.packed(plan, source.tensors)
    return lambda packer: packer.packed_stream(
        source.tensors(),
        bucket_bytes=config.bucket_bytes,
        dtype_of=lambda spec: wire_dtype(spec, checkpoint, served_dtype),
        expected=checkpoint.specs,
    )


def gather_only(source: WeightSource, plan: Sequence[Bucket]) -> None:
    """Take part in gathering what the sending rank gathers, in the same order."""
    for _ in source.tensors([name for bucket in plan for name in bucket.names]):
        pass
