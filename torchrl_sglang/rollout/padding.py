"""Which ids of the rows of a TensorDict are tokens, and which are padding: by a mask, or by their values.

Shapes: ``B`` sequences, each of its own length ``T``; ``ids_B_T`` is a list of lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey

from torchrl_sglang.errors import ConfigError

__all__ = ["find_padding", "first_match", "may_be_padded"]


def first_match(td: TensorDictBase, keys: Sequence[NestedKey], ids_B_T: list[list[int]]) -> list[list[bool]] | None:
    """The first mask among ``keys`` whose rows have the lengths of the ids."""
    for key in keys:
        value = td.get(key, None, as_list=True)
        if value is None:
            continue
        mask_B_T = (
            [row.bool().tolist() for row in value.unbind(0)]
            if isinstance(value, torch.Tensor)
            else [torch.as_tensor(row).bool().tolist() for row in value]
        )
        if [len(m) for m in mask_B_T] == [len(i) for i in ids_B_T]:
            _require_zeros_and_ones(value, key)
            return mask_B_T
    return None


def _require_zeros_and_ones(mask: Any, key: NestedKey) -> None:
    for row in mask.unbind(0) if isinstance(mask, torch.Tensor) else map(torch.as_tensor, mask):
        if row.dtype != torch.bool and not ((row == 0) | (row == 1)).all():
            raise ConfigError(
                f"the mask at {key!r} holds other values than 0 and 1 (masks that are added to attention scores do): "
                "1 or True must stand for a token, 0 or False for padding"
            )


def may_be_padded(td: TensorDictBase, key: NestedKey, dense: bool) -> bool:
    """Whether the rows at ``key`` may be padded: ``Tokens.padded`` says so, or else dense tensors may be."""
    marker = td.get((*key[:-1], "padded"), None) if isinstance(key, tuple) and len(key) > 1 else None
    if marker is not None:
        flags = marker.tolist() if hasattr(marker, "tolist") else marker
        flags = getattr(flags, "data", flags) if is_tensor_collection(flags) else flags
        return any(flags) if isinstance(flags, (list, tuple)) else bool(flags)
    return dense


def find_padding(
    ids_B_T: Sequence[Sequence[int]], padding_id: int | None, eos_id: int | None, bos_id: int | None
) -> list[list[bool]]:
    """Which ids of the rows of a dense tensor are tokens, judged by their values.

    The runs of the padding id at both ends of a row are padding. But a padding token that is also EOS may be the real
    end of a row in a tensor padded on the left, and one that is also BOS the real beginning of a row in a tensor padded
    on the right: a single one stays if no row of the tensor has more of them on that side, and the other side has some.

    Examples:
        >>> find_padding([[0, 0, 5, 0, 6]], 0, 2, 1)
        [[False, False, True, True, True]]
    """
    only_token = padding_id in (bos_id, eos_id) and all(len(ids_T) == 1 for ids_T in ids_B_T)
    if padding_id is None or only_token:  # one column of BOS: text generated from nothing
        return [[True] * len(ids_T) for ids_T in ids_B_T]
    edges = [_outer_runs(ids_T, padding_id) for ids_T in ids_B_T]
    real = [(left, right) for (left, right), ids_T in zip(edges, ids_B_T, strict=True) if left < len(ids_T)]
    most_left = max((left for left, _ in real), default=0)
    most_right = max((right for _, right in real), default=0)
    ends_with_eos = padding_id == eos_id and most_right == 1 and most_left > 0
    begins_with_bos = padding_id == bos_id and most_left == 1 and most_right > 0
    if ends_with_eos and begins_with_bos:  # one of each: nothing tells which is padding
        ends_with_eos = begins_with_bos = False
    keep_B_T = []
    for (left, right), ids_T in zip(edges, ids_B_T, strict=True):
        if left < len(ids_T):
            left, right = 0 if begins_with_bos else left, 0 if ends_with_eos else right
        keep_B_T.append([left <= i < len(ids_T) - right for i in range(len(ids_T))])
    return keep_B_T


def _outer_runs(ids_T: Sequence[int], padding_id: int) -> tuple[int, int]:
    """How many padding ids a row begins and ends with."""
    real = [i for i, token in enumerate(ids_T) if token != padding_id]
    return (real[0], len(ids_T) - 1 - real[-1]) if real else (len(ids_T), 0)
