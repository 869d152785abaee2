"""Check that the trainer's tensors match the served checkpoint, before anything is sent.

SGLang answers 200 to a name it doesn't know and goes on serving the old values, so only this check notices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from torchrl_sglang.config import nearest_name
from torchrl_sglang.errors import WeightCoverageError
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec

__all__ = ["check_coverage", "is_ignored"]

_MAX_LISTED = 10


def is_ignored(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``name`` matches one of the ``fnmatch`` patterns (case counts)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_coverage(
    specs: Mapping[str, TensorSpec] | Iterable[TensorSpec],
    checkpoint: Checkpoint,
    *,
    ignore: Sequence[str] = (),
    server: str | None = None,
) -> None:
    """Compare the trainer's tensors with the server's checkpoint.

    Args:
        specs: the trainer's tensors under checkpoint names (:meth:`WeightSource.specs`).
        checkpoint: what the server was started from.
        ignore: ``fnmatch`` patterns of names that are neither required nor sent.
        server: URL for the message; the error records that this server still holds its old weights.

    Raises:
        WeightCoverageError: names are missing or unknown, or a shape or kind of dtype differs. With a quantised
            checkpoint every dtype must be the checkpoint's own. The error lists the names.

    Examples:
        >>> checkpoint = Checkpoint.from_specs({"a.weight": ((2,), torch.float32)})
        >>> check_coverage([TensorSpec(name="a.weight", shape=(2,), dtype=torch.bfloat16)], checkpoint)
        >>> check_coverage([TensorSpec(name="a.weigth", shape=(2,), dtype=torch.float32)], checkpoint)
        Traceback (most recent call last):
        ...
        torchrl_sglang.errors.WeightCoverageError: the trainer's tensors don't match the served checkpoint:
        1 missing (the checkpoint has it, the trainer doesn't send it):
          a.weight
        1 unknown (a server would silently ignore it):
          a.weigth. Did you mean 'a.weight'?
        Nothing was sent. Rename with SyncConfig.name_map, or leave out on purpose with SyncConfig.ignore.
    """
    specs = specs.values() if isinstance(specs, Mapping) else specs
    sent = {spec.name: spec for spec in specs if not is_ignored(spec.name, ignore)}
    missing = [
        name
        for name in checkpoint.specs
        if name not in sent and not is_ignored(name, ignore) and not checkpoint.is_optional(name)
    ]
    unknown = [name for name in sent if name not in checkpoint.specs]
    mismatched = [
        line
        for name, spec in sent.items()
        if name in checkpoint.specs
        for line in _mismatches(spec, checkpoint.specs[name], exact_dtype=checkpoint.quantization is not None)
    ]
    if not (missing or unknown or mismatched):
        return
    if not sent:
        problem = "the trainer's weights hold no tensor at all"
    elif checkpoint.quantization is not None:
        problem = (
            f"the served checkpoint is quantised ({checkpoint.quantization}), so it takes only tensors with exactly "
            "its own names and dtypes (scales included); serve the unquantised checkpoint instead, or send quantised "
            "tensors. They don't match"
        )
    else:
        problem = "the trainer's tensors don't match the served checkpoint"
    raise WeightCoverageError(
        _message(problem, server, missing, unknown, mismatched, checkpoint),
        server_weights={server: "old"} if server else None,
        missing=missing,
        unknown=unknown,
        mismatched=mismatched,
    )


def _mismatches(sent: TensorSpec, stored: TensorSpec, *, exact_dtype: bool) -> list[str]:
    if sent.shape != stored.shape:
        return [f"{sent.name}: shape {sent.shape} sent, {stored.shape} in the checkpoint"]
    same_kind = _dtype_kind(sent.dtype) == _dtype_kind(stored.dtype)
    if sent.dtype != stored.dtype and (exact_dtype or not same_kind):
        return [f"{sent.name}: dtype {_dtype_name(sent.dtype)} sent, {_dtype_name(stored.dtype)} in the checkpoint"]
    return []


def _dtype_kind(dtype: torch.dtype) -> tuple[bool, bool]:
    """Kinds of dtype that a server can cast between. 8-bit floats are one of their own: they need a scale."""
    return dtype.is_floating_point, dtype.is_floating_point and dtype.itemsize == 1


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _message(
    problem: str,
    server: str | None,
    missing: Sequence[str],
    unknown: Sequence[str],
    mismatched: Sequence[str],
    checkpoint: Checkpoint,
) -> str:
    candidates = missing or list(checkpoint.specs)
    unknown_lines = [
        name + (f".{hint}" if (hint := nearest_name(name, candidates)) else "") for name in unknown[:_MAX_LISTED]
    ]
    sections = [problem + (f" of {server}:" if server else ":")]
    it = {True: "it", False: "them"}
    for heading, total, lines in (
        (
            f"missing (the checkpoint has {it[len(missing) == 1]}, the trainer doesn't send {it[len(missing) == 1]})",
            len(missing),
            missing,
        ),
        (f"unknown (a server would silently ignore {it[len(unknown) == 1]})", len(unknown), unknown_lines),
        ("of another shape or kind of dtype", len(mismatched), mismatched),
    ):
        if total:
            more = [f"... and {total - _MAX_LISTED} more"] if total > _MAX_LISTED else []
            sections.append(f"{total} {heading}:\n" + "\n".join(f"  {line}" for line in [*lines[:_MAX_LISTED], *more]))
    sections.append(
        "Nothing was sent. Rename with SyncConfig.name_map, or leave out on purpose with SyncConfig.ignore."
    )
    return "\n".join(sections)
