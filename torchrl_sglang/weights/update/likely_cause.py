"""Why a server that holds the trainer's weights may compute something else than the trainer's model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["likely_cause", "rounded_tables"]


def likely_cause(
    model: nn.Module | None, architecture: str | None, *, served: Sequence[str], served_dtype: torch.dtype | None
) -> str:
    """What the trainer's model gives away about a failed verification.

    Args:
        model: the trainer's model; ``None`` if there is none.
        architecture: its class, if known.
        served: architectures of the served checkpoint.
        served_dtype: what the servers compute in.

    Returns:
        One or two sentences.
    """
    if model is None:
        return "The servers should answer alike: does each of them serve the same checkpoint, with the same flags?"
    if architecture is not None and served and architecture not in served:
        return f"Likely cause: the trainer's model is a {architecture}, the servers hold {' or '.join(served)}."
    rounded = rounded_tables(model)
    if rounded:
        name, dtype = next(iter(rounded.items()))
        return (
            "Likely cause: the trainer's model was converted after loading (.bfloat16(), .half() or .to(dtype)), which "
            f"rounded its rotary table {name} to {dtype}; the servers' is exact. Load it with "
            "from_pretrained(..., dtype=torch.bfloat16), which keeps the table in float32."
        )
    computed = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if computed is not None and served_dtype is not None and computed != served_dtype:
        return (
            f"Likely cause: the trainer computes in {_name(computed)} and the servers in {_name(served_dtype)}, whose "
            "rounding differs. Use one dtype on both sides, or set SyncConfig.verify_atol."
        )
    return (
        "Does the trainer's model compute what the served checkpoint's architecture does (rope scaling, attention, "
        "logit scaling)? SyncConfig.verify_atol widens the tolerance."
    )


def rounded_tables(model: nn.Module) -> dict[str, str]:
    """Rotary tables whose values have been rounded to half precision, with that precision.

    A table that was rounded and converted back is recognised too: all of its values fit into the lower precision,
    which those of an exact table don't.

    Examples:
        >>> model = nn.Module()
        >>> model.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, 64, 2) / 64), persistent=False)
        >>> rounded_tables(model), rounded_tables(model.bfloat16())
        ({}, {'inv_freq': 'bfloat16'})
    """
    found = {}
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] != "inv_freq" or not buffer.is_floating_point() or buffer.numel() < 4:
            continue
        exact = buffer.float()
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(exact.to(dtype).float(), exact):
                found[name] = _name(dtype)
                break
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
