"""One row of each of a checkpoint's tensors: enough to tell whether a trainer has the same weights."""

from __future__ import annotations

from collections.abc import Collection

import torch

from torchrl_sglang.weights.checkpoint.headers import Checkpoint, weight_files

__all__ = ["read_rows"]


def read_rows(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Read the middle row of each tensor, or all of a vector. Only these pages are read from disk.

    Args:
        checkpoint: a checkpoint; one without files (:meth:`Checkpoint.from_specs`) has no rows.
        names: which tensors; names that the checkpoint lacks, scalars, empty and non-floating tensors are left out.

    Returns:
        Name to the row, shape (columns...), in the stored dtype.
    """
    if checkpoint.path is None:
        return {}
    from safetensors import safe_open  # slow to import

    rows: dict[str, torch.Tensor] = {}
    wanted = {
        name
        for name in names
        if (spec := checkpoint.specs.get(name)) is not None
        and spec.shape
        and spec.numel
        and spec.dtype.is_floating_point
        and spec.dtype.itemsize > 1
    }
    for file in weight_files(checkpoint.path):
        with safe_open(file, framework="pt") as stored:
            for name in wanted.intersection(stored.keys()):
                shape = checkpoint.specs[name].shape
                part = stored.get_slice(name)
                rows[name] = part[shape[0] // 2] if len(shape) > 1 else part[:]
    return rows
