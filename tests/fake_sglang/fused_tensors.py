"""The tensors that SGLang holds for a Llama-like checkpoint: fused, and divided between tensor-parallel ranks.

Written from SGLang's model files, apart from what the package computes, so that the two check each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

__all__ = ["fused_checksums"]

_FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
_INSIDE = {"k_proj", "v_proj", "up_proj"}


def fused_checksums(
    tensors: Mapping[str, torch.Tensor], tp_rank: int, tp_size: int, skip: Sequence[str]
) -> dict[str, str]:
    """First 8 bytes of sha256 of each tensor of a rank, by SGLang's name; names that contain a word of ``skip`` not."""
    held: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        parent, _, short = module.rpartition(".")
        if short in _FUSED:
            fused, parts = _FUSED[short]
            pieces = [tensors[f"{parent}.{part}.{leaf}"].chunk(tp_size)[tp_rank] for part in parts]
            held[f"{parent}.{fused}.{leaf}"] = torch.cat(pieces)
        elif short in ("o_proj", "down_proj") and leaf == "weight":
            held[name] = tensor.chunk(tp_size, dim=1)[tp_rank]
        elif short in ("embed_tokens", "lm_head"):
            held[name] = tensor.chunk(tp_size)[tp_rank]
        elif short not in _INSIDE:
            held[name] = tensor
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        for name, tensor in held.items()
        if not any(word in name for word in skip)
    }
