"""Divide tensors into buckets, each sent in one request, by their names and sizes.

A bucket contains the bytes of its tensors without gaps, as SGLang's ``flattened_bucket`` requires. Source: SGLang
0.5.23, ``FlattenedTensorBucket.empty``, which refuses a tensor whose offset is not a multiple of its item size. So a
bucket begins with the dtypes of the largest item size.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec

__all__ = ["Bucket", "Slot", "plan_buckets", "trainable_specs", "transfer_units", "unit_key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Position of one tensor in its bucket.

    Attributes:
        name: checkpoint name.
        dtype: element type in the bucket.
        shape: sizes per dimension.
        offset: position of the first byte; a multiple of the item size.
        nbytes: number of bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor in a bucket's bytes (uint8, ``(bucket.nbytes,)``), sharing their memory."""
        return flat[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Layout of the tensors that are sent in one request.

    Attributes:
        slots: the tensors' positions, in order.

    Examples:
        >>> bucket = Bucket.of([
        ...     TensorSpec(name="half", shape=(3,), dtype=torch.bfloat16),
        ...     TensorSpec(name="full", shape=(2,), dtype=torch.float32),
        ... ])
        >>> [(slot.name, slot.offset) for slot in bucket.slots], bucket.nbytes
        ([('full', 0), ('half', 8)], 14)
    """

    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> Bucket:
        """Lay out tensors: larger item sizes first, otherwise in the given order."""
        slots = []
        offset = 0
        for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
            slots.append(Slot(name=spec.name, dtype=spec.dtype, shape=spec.shape, offset=offset, nbytes=spec.nbytes))
            offset += spec.nbytes
        return cls(slots=tuple(slots))

    @cached_property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(slot.nbytes for slot in self.slots)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Tensor names, in order."""
        return tuple(slot.name for slot in self.slots)

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Element types, in order."""
        return tuple(slot.dtype for slot in self.slots)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes, in order."""
        return tuple(slot.shape for slot in self.slots)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """All tensors in the bucket's bytes (uint8, ``(nbytes,)``), sharing their memory."""
        return [slot.view(flat) for slot in self.slots]


def plan_buckets(specs: Iterable[TensorSpec], *, bucket_bytes: int) -> list[Bucket]:
    """Divide tensors into buckets, in the given order except that transfer units stay together.

    A layer that fits into one bucket is not divided, unless the bucket before it would stay more than half empty. A
    layer is divided between attention and feed-forward first, then between projections. Tensors that a server must
    load in one request (:func:`transfer_units`) are never divided, even if they exceed ``bucket_bytes``.

    Args:
        specs: tensors with the dtype in which they are sent.
        bucket_bytes: maximum size of a bucket; a larger unit gets a bucket of its own.

    Raises:
        ConfigError: ``bucket_bytes`` is not positive, or a name occurs twice.

    Examples:
        >>> specs = [TensorSpec(name=f"layers.{i}.w", shape=(4,), dtype=torch.float32) for i in range(3)]
        >>> [bucket.names for bucket in plan_buckets(specs, bucket_bytes=32)]
        [('layers.0.w', 'layers.1.w'), ('layers.2.w',)]
    """
    if bucket_bytes <= 0:
        raise ConfigError(f"bucket_bytes must be positive, got {bucket_bytes}")
    planner = _BucketPlanner(bucket_bytes)
    for group in _group_units(transfer_units(specs), (_layer_of, _block_of)):
        planner.add(group)
    return planner.finish()


_FUSED_MODULES = (
    frozenset({"q_a_proj", "kv_a_proj_with_mqa", "g_proj"}),
    frozenset({"wq_a", "wkv"}),
    frozenset({"wkv", "wgate"}),
    frozenset({"wk", "weights_proj"}),
)
"""Sibling modules that a loader of SGLang fuses. It silently drops them unless all of them are in one request.

Source: SGLang 0.5.23, the caches local to ``load_weights`` in ``deepseek_weight_loader``, ``deepseek_v4``,
``glm4_moe_lite``, ``longcat_flash``, ``dots3_common``.
"""


def transfer_units(specs: Iterable[TensorSpec]) -> list[tuple[TensorSpec, ...]]:
    """Group tensors that must be in one request: those of one module (weight, bias, scale) and of fused siblings.

    Units are in the order of their first tensors.

    Raises:
        ConfigError: a name occurs twice.
    """
    units: dict[str, list[TensorSpec]] = {}
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise ConfigError(f"two tensors are called {spec.name!r}")
        seen.add(spec.name)
        units.setdefault(unit_key(spec.name), []).append(spec)
    return [tuple(unit) for unit in units.values()]


def trainable_specs(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Tensors that an optimiser changes, and frozen tensors that must be in the same request as one of them.

    Examples:
        >>> shape = {"shape": (2,), "dtype": torch.float32}
        >>> names = ("attn.q_a_proj.weight", "attn.o_proj.weight")
        >>> frozen = [TensorSpec(name=name, trainable=False, **shape) for name in names]
        >>> trained = TensorSpec(name="attn.kv_a_proj_with_mqa.weight", **shape)
        >>> [spec.name for spec in trainable_specs([*frozen, trained])]
        ['attn.q_a_proj.weight', 'attn.kv_a_proj_with_mqa.weight']
    """
    return [spec for unit in transfer_units(specs) if any(spec.trainable for spec in unit) for spec in unit]


def unit_key(name: str) -> str:
    """Key of a tensor's transfer unit: equal for tensors that must be in one request.

    Examples:
        >>> unit_key("layers.0.self_attn.q_a_proj.weight") == unit_key("layers.0.self_attn.kv_a_proj_with_mqa.weight")
        True
        >>> unit_key("layers.0.self_attn.q_proj.weight") == unit_key("layers.0.self_attn.k_proj.weight")
        False
    """
    module, _, _ = name.rpartition(".")
    if not module:
        return name
    parent, _, leaf = module.rpartition(".")
    families = [index for index, family in enumerate(_FUSED_MODULES) if leaf in family]
    # wkv is in two families, so all three modules of these families form one unit.
    return f"{parent}.<{'wkv' if 1 in families or 2 in families else families[0]}>" if families else module


_LAYER = re.compile(r"^(.*?\.\d+)\.")
_Group = tuple[TensorSpec, ...] | list["_Group"]
"""A transfer unit, or a list of groups that should share a bucket."""


def _layer_of(name: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj.weight``; the whole name if it belongs to no layer."""
    match = _LAYER.match(name)
    return match.group(1) if match else name


def _block_of(name: str) -> str:
    """``model.layers.3.mlp`` of ``model.layers.3.mlp.up_proj.weight``; each expert is a block of its own."""
    return name.rsplit(".", 2)[0]


def _group_units(units: Sequence[tuple[TensorSpec, ...]], levels: Sequence[Callable[[str], str]]) -> Iterator[_Group]:
    """Group neighbouring units by layer, and within a layer by block."""
    if not levels:
        yield from units
        return
    level, *inner_levels = levels
    for _, neighbours in itertools.groupby(units, key=lambda unit: level(unit[0].name)):
        yield list(_group_units(list(neighbours), inner_levels))


class _BucketPlanner:
    """Fills one bucket after the other with the groups that are added."""

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._buckets: list[Bucket] = []
        self._open: list[TensorSpec] = []
        self._open_bytes = 0

    def add(self, group: _Group) -> None:
        specs = list(_flatten(group))
        nbytes = sum(spec.nbytes for spec in specs)
        if self._open_bytes + nbytes <= self._bucket_bytes:
            self._open += specs
            self._open_bytes += nbytes
        elif isinstance(group, list) and (nbytes > self._bucket_bytes or self._open_bytes * 2 < self._bucket_bytes):
            for part in group:
                self.add(part)
        else:
            self._close()
            self._open, self._open_bytes = specs, nbytes

    def finish(self) -> list[Bucket]:
        self._close()
        return self._buckets

    def _close(self) -> None:
        if self._open:
            self._buckets.append(Bucket.of(self._open))
        self._open, self._open_bytes = [], 0


def _flatten(group: _Group) -> Iterator[TensorSpec]:
    if isinstance(group, list):
        for part in group:
            yield from _flatten(part)
    else:
        yield from group
