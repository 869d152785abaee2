"""Hashes that servers' tensors must have, from tensors that the trainer reads again, has kept, or has on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.checksums.hashing import hash_function
from torchrl_sglang.weights.checksums.layouts import Place, layouts
from torchrl_sglang.weights.checksums.rules import TensorId
from torchrl_sglang.weights.checksums.server_tensors import FusedUnit
from torchrl_sglang.weights.source.interface import WeightSource

__all__ = ["CheckpointTensors", "ReadAgain", "SentTensors", "ServerKind", "TensorHashes"]

Parts = Mapping[str, torch.Tensor]

_KEPT_BYTES = 128 * 2**20
"""Copies of more than this are hashed at once and freed, while the push waits; the others after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind:
    """What the hashes of a server depend on.

    Attributes:
        tp_size: tensor-parallel ranks.
        dtype: what it computes in, if that is known.
        device: ``ServerInfo.device``.
        heads: attention heads of the model, if known.
        kv_heads: key/value heads, if known.
    """

    tp_size: int
    dtype: torch.dtype | None
    device: str
    heads: int | None
    kv_heads: int | None


class TensorHashes:
    """Hashes in every layout, each computed once.

    Args:
        servers: by URL.
        parts: the tensors of a unit by checkpoint name, or ``None`` where they are unknown.
    """

    def __init__(self, servers: Mapping[str, ServerKind], parts: Callable[[FusedUnit], Parts | None]) -> None:
        self._servers = dict(servers)
        self._parts = parts
        self._known: dict[tuple[object, ...], dict[str, str]] = {}

    def of(self, unit: FusedUnit, tensor: TensorId, layout: str | None = None) -> Iterator[tuple[str, str]]:
        """See :class:`~torchrl_sglang.weights.checksums.rules.Hashes`."""
        server = self._servers.get(tensor.url)
        if server is None:
            return
        tp_rank = tensor.tp_rank % server.tp_size
        known = self._known.setdefault((unit.name, tensor.name, tp_rank, server), {})
        parts = self._parts(unit)
        if parts is None:
            yield from [(label, value) for label, value in known.items() if layout in (None, label)]
            return
        place = Place(tp_rank=tp_rank, tp_size=server.tp_size, heads=server.heads, kv_heads=server.kv_heads)
        server_name = tensor.name if tensor.name in unit.server_names else unit.name
        for dtype in _dtypes(server, parts):
            makes = layouts(unit, server_name, _cast(parts, dtype), place)
            for name, make in makes.items():
                label = f"{name}, {dtype}"
                if layout not in (None, label):
                    continue
                if label not in known:
                    known[label] = hash_function(server.device)(make())
                yield label, known[label]


def _dtypes(server: ServerKind, parts: Parts) -> list[torch.dtype | None]:
    """Dtypes in which a server may hold a unit, the likeliest first; ``None`` leaves it as it is."""
    own = {tensor.dtype for tensor in parts.values()}
    if not all(dtype.is_floating_point for dtype in own):
        return [None]
    usual = [server.dtype, *own, torch.float32, torch.bfloat16, torch.float16]
    return list(dict.fromkeys(dtype for dtype in usual if dtype is not None))


class _Cast(dict[str, torch.Tensor]):
    """Casts a tensor when it is first read."""

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__(parts)
        self._dtype = dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name)
        return tensor if tensor.dtype == self._dtype else tensor.to(self._dtype)


def _cast(parts: Parts, dtype: torch.dtype | None) -> Parts:
    return parts if dtype is None else _Cast(parts, dtype)


class ReadAgain:
    """Tensors of a source that can be read any number of times. Holds one unit.

    Args:
        source: the trainer's weights.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._last: tuple[str, Parts] = ("", {})

    def parts(self, unit: FusedUnit) -> Parts:
        """The tensors of a unit."""
        if self._last[0] != unit.name:
            self._last = ("", {})  # frees the unit before the next one is read
            self._last = (unit.name, dict(self._source.tensors(unit.parts)))
        return self._last[1]


class SentTensors:
    """Copies of the sample's tensors, taken from packed buckets, for a source that is read only once.

    Args:
        sample: what to keep.
        on_full: called with a complete unit and its tensors when more than 128 MB are kept; they are then freed.
    """

    def __init__(self, sample: Sequence[FusedUnit], on_full: Callable[[FusedUnit], None]) -> None:
        self._units = {part: unit for unit in sample for part in unit.parts}
        self._kept: dict[str, dict[str, torch.Tensor]] = {unit.name: {} for unit in sample}
        self._on_full = on_full
        self._nbytes = 0

    def take(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """Copy what belongs to the sample from a bucket's bytes (uint8, ``(bucket.nbytes,)``)."""
        for slot in bucket.slots:
            if slot.name in self._units:
                self._keep(slot.name, slot.view(flat).detach().clone())

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        unit = self._units[name]
        kept = self._kept.get(unit.name)
        if kept is None:
            return
        kept[name] = tensor
        self._nbytes += tensor.nbytes
        if self._nbytes > _KEPT_BYTES and len(kept) == len(unit.parts):
            self._on_full(unit)
            self._nbytes -= sum(each.nbytes for each in kept.values())
            del self._kept[unit.name]

    def parts(self, unit: FusedUnit) -> Parts | None:
        """The tensors of a unit, or ``None`` if they are not all kept."""
        kept = self._kept.get(unit.name, {})
        return kept if kept and len(kept) == len(unit.parts) else None


class CheckpointTensors:
    """Tensors of a checkpoint's folder, each unit read when it is asked for.

    Args:
        folder: holds safetensors files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of: dict[str, Path] | None = None

    def parts(self, unit: FusedUnit) -> Parts | None:
        """The tensors of a unit, or ``None`` if they can't be read."""
        try:
            files = self._files()
            return {name: _read(files[name], name) for name in unit.parts}
        except (OSError, KeyError, ValueError):
            return None

    def _files(self) -> dict[str, Path]:
        if self._file_of is None:
            index = self._folder / "model.safetensors.index.json"
            if index.is_file():
                files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._file_of = {name: self._folder / file for name, file in files.items()}
            else:
                self._file_of = {}
                for file in sorted(self._folder.glob("*.safetensors")):
                    with safe_open(str(file), framework="pt") as opened:
                        self._file_of.update(dict.fromkeys(opened.keys(), file))
        return self._file_of


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(str(file), framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor
