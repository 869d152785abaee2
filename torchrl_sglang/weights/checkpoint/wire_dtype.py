"""The dtype in which a tensor is sent to the servers."""

from __future__ import annotations

import torch

from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec

__all__ = ["wire_dtype"]


def wire_dtype(source: TensorSpec, checkpoint: Checkpoint, server_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor is sent: the server's dtype if that is narrower, so that no byte is sent in vain.

    Only matrices are narrowed. They are nearly all the bytes, and a server may keep a vector (a router's bias, a decay)
    in a wider dtype than its own. For the same reason a matrix that the checkpoint stores wider than most of its
    elements keeps its dtype. Nothing is widened: the server casts while it loads.

    Args:
        source: the trainer's tensor.
        checkpoint: what the server was started from.
        server_dtype: what the server computes in; ``None`` sends everything in the trainer's dtype.

    Examples:
        >>> checkpoint = Checkpoint.from_specs({"w": ((2, 2), torch.float32), "b": ((2,), torch.float32)})
        >>> [wire_dtype(spec, checkpoint, torch.bfloat16) for spec in checkpoint.specs.values()]
        [torch.bfloat16, torch.float32]
    """
    if server_dtype is None or checkpoint.quantization is not None:
        return source.dtype
    if not source.dtype.is_floating_point or len(source.shape) < 2 or source.dtype.itemsize <= server_dtype.itemsize:
        return source.dtype
    stored = checkpoint.specs.get(source.name)
    usual = checkpoint.dtype
    if stored is not None and usual is not None and stored.dtype.itemsize > usual.itemsize:
        return source.dtype
    return server_dtype
