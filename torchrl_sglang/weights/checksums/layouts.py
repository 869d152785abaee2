"""How a rank of a server may hold a tensor: whole, or the part that tensor parallelism gives it.

The expected layout comes first; the others are for servers whose model code does it in another way. A layout that has
matched a server's hash once is the one from then on (see :mod:`~torchrl_sglang.weights.checksums.rules`).

Source: SGLang 0.5.23, ``layers/linear.py``, ``layers/vocab_parallel_embedding.py`` and ``layers/moe/fused_moe_triton``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from torchrl_sglang.weights.checksums.server_tensors import FusedUnit

__all__ = ["Place", "layouts"]

Make = Callable[[], torch.Tensor]

_SPLIT_BY_COLUMNS = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "dense_4h_to_h.weight", "fc2.weight")
_VOCABULARY = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight"),
    *("lm_head.weight", "lm_head.bias", "embed_out.weight"),
)
_VOCABULARY_PADDING = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One rank among those of its server.

    Attributes:
        tp_rank: its number.
        tp_size: how many there are.
        heads: number of attention heads of the model; ``None`` if unknown.
        kv_heads: number of key/value heads; ``None`` if unknown.
    """

    tp_rank: int
    tp_size: int
    heads: int | None = None
    kv_heads: int | None = None


def layouts(unit: FusedUnit, server_name: str, parts: Mapping[str, torch.Tensor], place: Place) -> dict[str, Make]:
    """The layouts in which a rank may hold a unit, the expected one first.

    Args:
        unit: what the checkpoint has.
        server_name: one of :attr:`FusedUnit.server_names`.
        parts: the unit's tensors, by checkpoint name, whole.
        place: the rank.

    Returns:
        Per name of a layout, a function that makes the rank's tensor.
    """
    tensors = [parts[name] for name in unit.parts]
    if unit.fusion == "rows" and server_name == unit.name:
        return _stacked(tensors, place)
    if unit.fusion == "expert_gate_up":
        return _experts(tensors, place, group=2, dim=0)
    if unit.fusion == "expert_down":
        return _experts(tensors, place, group=1, dim=1)
    return _plain(server_name, parts[server_name] if server_name in parts else tensors[0], place)


def _stacked(tensors: Sequence[torch.Tensor], place: Place) -> dict[str, Make]:
    makes: dict[str, Make] = {}
    heads, size = place.kv_heads, place.tp_size
    if size > 1 and len(tensors) == 3 and heads is not None and heads < size and size % heads == 0:
        makes["key/value heads repeated"] = lambda: torch.cat(
            [_chunk(tensors[0], place), *(_chunk(each, _head_of(place, heads)) for each in tensors[1:])]
        )
    if all(tensor.shape[0] % size == 0 for tensor in tensors):
        makes["rows"] = lambda: torch.cat([_chunk(tensor, place) for tensor in tensors])
    if size > 1:
        makes["whole"] = lambda: torch.cat(list(tensors))
    return makes


def _experts(tensors: Sequence[torch.Tensor], place: Place, *, group: int, dim: int) -> dict[str, Make]:
    """``(experts, rows, columns)``; each expert's tensors are divided between ranks, or the experts are."""

    def stack(divided: Sequence[torch.Tensor]) -> torch.Tensor:
        grouped = [divided[start : start + group] for start in range(0, len(divided), group)]
        return torch.stack([torch.cat(list(each)) for each in grouped])

    makes: dict[str, Make] = {}
    size, num_experts = place.tp_size, len(tensors) // group
    if all(tensor.shape[dim] % size == 0 for tensor in tensors):
        makes["divided"] = lambda: stack([_chunk(tensor, place, dim) for tensor in tensors])
    if size > 1 and num_experts % size == 0:
        per_rank = num_experts // size * group
        makes["some experts"] = lambda: stack(tensors[place.tp_rank * per_rank : (place.tp_rank + 1) * per_rank])
    if size > 1:
        makes["whole"] = lambda: stack(tensors)
    return makes


def _plain(name: str, tensor: torch.Tensor, place: Place) -> dict[str, Make]:
    makes: dict[str, Make] = {}
    size = place.tp_size

    def add(layout: str, divisible: bool, make: Make) -> None:
        if divisible:
            makes.setdefault(layout, make)

    rows = tensor.dim() >= 1 and tensor.shape[0] % size == 0
    columns = tensor.dim() >= 2 and tensor.shape[1] % size == 0
    if name.endswith(_VOCABULARY):
        add("vocabulary", tensor.dim() in (1, 2), lambda: _vocabulary(tensor, place))
    if name.endswith(_SPLIT_BY_COLUMNS):
        add("columns", columns and size > 1, lambda: _chunk(tensor, place, 1))
    add("whole", True, lambda: tensor)
    add("rows", rows and size > 1, lambda: _chunk(tensor, place))
    add("columns", columns and size > 1, lambda: _chunk(tensor, place, 1))
    heads = _heads_of(tensor, place) if name.endswith(("qkv_proj.weight", "qkv_proj.bias")) and size > 1 else None
    if heads is not None:
        makes |= {f"{layout} of heads": make for layout, make in _stacked(heads, place).items() if layout != "whole"}
    if name.endswith(("gate_up_proj.weight", "gate_up_proj.bias")):
        halves = tensor.chunk(2)
        add("rows of halves", size > 1 and halves[0].shape[0] % size == 0, lambda: _rows_of(halves, place))
    if tensor.dim() == 2:
        turned = tensor.T
        add("transposed", True, lambda: turned)
        add("rows of the transposed", columns and size > 1, lambda: _chunk(turned, place))
        add("columns of the transposed", rows and size > 1, lambda: _chunk(turned, place, 1))
    return makes


def _heads_of(tensor: torch.Tensor, place: Place) -> tuple[torch.Tensor, ...] | None:
    """Query, key and value of a checkpoint that has fused them itself."""
    if place.heads is None or place.kv_heads is None or tensor.shape[0] % (place.heads + 2 * place.kv_heads):
        return None
    size = tensor.shape[0] // (place.heads + 2 * place.kv_heads)
    sizes = [place.heads * size, place.kv_heads * size, place.kv_heads * size]
    return torch.split_with_sizes(tensor, sizes)


def _rows_of(tensors: Sequence[torch.Tensor], place: Place) -> torch.Tensor:
    return torch.cat([_chunk(tensor, place) for tensor in tensors])


def _chunk(tensor: torch.Tensor, place: Place, dim: int = 0) -> torch.Tensor:
    size = tensor.shape[dim] // place.tp_size
    return tensor.narrow(dim, place.tp_rank * size, size)


def _head_of(place: Place, heads: int) -> Place:
    """The key/value head that a rank shares with others, as a rank among as many ranks as there are heads."""
    return Place(tp_rank=place.tp_rank * heads // place.tp_size, tp_size=heads)


def _vocabulary(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """A rank's rows of an embedding that is padded with zeros to a multiple of 64 rows."""
    padding = _VOCABULARY_PADDING
    if math.ceil(tensor.shape[0] / padding) * padding % place.tp_size:
        padding *= place.tp_size
    per_rank = math.ceil(tensor.shape[0] / padding) * padding // place.tp_size
    start = min(place.tp_rank * per_rank, tensor.shape[0])
    rows = tensor[start : start + per_rank]
    missing = per_rank - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *tensor.shape[1:])]) if missing else rows
