"""Which tensors travel together: a plan of buckets, made from names and sizes alone.

A bucket is the bytes of its tensors one behind the other, nothing in between, as SGLang's ``flattened_bucket`` wants
it. Source: SGLang 0.5.23, ``FlattenedTensorBucket.empty``, which refuses a tensor whose offset is no multiple of its
item size; so a bucket holds its widest items first.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.checkpoint.headers import TensorSpec

__all__ = ["Bucket", "Slot", "plan_buckets", "trainable_specs", "travel_units", "unit_key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one tensor lies in its bucket.

    Attributes:
        name: checkpoint name.
        dtype: as it travels.
        shape: sizes per dimension.
        offset: first byte; a multiple of the item size.
        nbytes: number of bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """This tensor inside a bucket's bytes (uint8, ``(bucket.nbytes,)``); shares their memory."""
        return flat[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Tensors that travel in one request.

    Attributes:
        slots: in the order of their bytes.

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
        """Lay tensors out, widest items first and otherwise in the order given."""
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
        """Every tensor inside the bucket's bytes (uint8, ``(nbytes,)``); they share its memory."""
        return [slot.view(flat) for slot in self.slots]


def plan_buckets(specs: Iterable[TensorSpec], *, bucket_bytes: int) -> list[Bucket]:
    """Divide tensors into buckets, in the order given as far as what belongs together allows.

    A layer stays in one bucket if it fits into one, unless that would leave the bucket before it more than half empty;
    a layer that is divided is divided between attention and feed-forward, then between projections. What a server can
    only load in one request (:func:`travel_units`) is never divided, even if it is larger than a bucket.

    Args:
        specs: tensors with the dtype they travel in.
        bucket_bytes: most bytes per bucket; a larger unit gets a bucket of its own.

    Raises:
        ConfigError: ``bucket_bytes`` is not positive, or a name occurs twice.

    Examples:
        >>> specs = [TensorSpec(name=f"layers.{i}.w", shape=(4,), dtype=torch.float32) for i in range(3)]
        >>> [bucket.names for bucket in plan_buckets(specs, bucket_bytes=32)]
        [('layers.0.w', 'layers.1.w'), ('layers.2.w',)]
    """
    if bucket_bytes <= 0:
        raise ConfigError(f"bucket_bytes must be positive, got {bucket_bytes}")
    filler = _Filler(bucket_bytes)
    for unit in _nested(travel_units(specs), (_layer, _block)):
        filler.add(unit)
    return filler.done()


_REQUEST_LOCAL = (
    frozenset({"q_a_proj", "kv_a_proj_with_mqa", "g_proj"}),
    frozenset({"wq_a", "wkv"}),
    frozenset({"wkv", "wgate"}),
    frozenset({"wk", "weights_proj"}),
)
"""Sister modules that some loader joins from the tensors of one call; what is missing in that call is lost silently.

Source: SGLang 0.5.23, the caches local to ``load_weights`` in ``deepseek_weight_loader``, ``deepseek_v4``,
``glm4_moe_lite``, ``longcat_flash``, ``dots3_common``.
"""


def travel_units(specs: Iterable[TensorSpec]) -> list[tuple[TensorSpec, ...]]:
    """Group tensors that must be in one request: those of one module (weight, bias, scale) and of fused sisters.

    A unit stands where its first tensor stood.

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
    """Those an optimiser changes, and the frozen ones a server needs in the same request as one of them.

    Examples:
        >>> shape = {"shape": (2,), "dtype": torch.float32}
        >>> names = ("attn.q_a_proj.weight", "attn.o_proj.weight")
        >>> frozen = [TensorSpec(name=name, trainable=False, **shape) for name in names]
        >>> trained = TensorSpec(name="attn.kv_a_proj_with_mqa.weight", **shape)
        >>> [spec.name for spec in trainable_specs([*frozen, trained])]
        ['attn.q_a_proj.weight', 'attn.kv_a_proj_with_mqa.weight']
    """
    return [spec for unit in travel_units(specs) if any(spec.trainable for spec in unit) for spec in unit]


def unit_key(name: str) -> str:
    """Equal for tensors that must travel together.

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
    families = [index for index, family in enumerate(_REQUEST_LOCAL) if leaf in family]
    # wkv is in two families: whichever sister is there, the three of them stay together.
    return f"{parent}.<{'wkv' if 1 in families or 2 in families else families[0]}>" if families else module


_LAYER = re.compile(r"^(.*?\.\d+)\.")
_Nested = tuple[TensorSpec, ...] | list["_Nested"]


def _layer(name: str) -> str:
    """``model.layers.3``; a name outside the layers is alone."""
    match = _LAYER.match(name)
    return match.group(1) if match else name


def _block(name: str) -> str:
    """``model.layers.3.self_attn``, down to the projections of one expert."""
    return name.rsplit(".", 2)[0]


def _nested(units: Sequence[tuple[TensorSpec, ...]], levels: Sequence[object]) -> Iterator[_Nested]:
    """Neighbouring units put together by layer, and inside a layer by block."""
    if not levels:
        yield from units
        return
    level, *deeper = levels
    for _, neighbours in itertools.groupby(units, key=lambda unit: level(unit[0].name)):  # type: ignore[operator]
        yield list(_nested(list(neighbours), deeper))


class _Filler:
    def __init__(self, bucket_bytes: int) -> None:
        self._limit = bucket_bytes
        self._buckets: list[Bucket] = []
        self._open: list[TensorSpec] = []
        self._open_bytes = 0

    def add(self, item: _Nested) -> None:
        specs = list(_flatten(item))
        size = sum(spec.nbytes for spec in specs)
        if self._open_bytes + size <= self._limit:
            self._open += specs
            self._open_bytes += size
            return
        divisible = isinstance(item, list)
        if divisible and (size > self._limit or self._open_bytes * 2 < self._limit):
            for part in item:
                self.add(part)  # type: ignore[arg-type]
            return
        self._close()
        self._open, self._open_bytes = specs, size

    def done(self) -> list[Bucket]:
        self._close()
        return self._buckets

    def _close(self) -> None:
        if self._open:
            self._buckets.append(Bucket.of(self._open))
        self._open, self._open_bytes = [], 0


def _flatten(item: _Nested) -> Iterator[TensorSpec]:
    if isinstance(item, list):
        for part in item:
            yield from _flatten(part)
    else:
        yield from item
