"""The refusal before the first byte: do the trainer's tensors match the served checkpoint, name by name?

SGLang answers 200 to a name it doesn't know and goes on serving the old values, so nobody else will notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from torchrl_sglang.config import nearest_name
from torchrl_sglang.errors import WeightCoverageError
from torchrl_sglang.weights.checkpoint.headers import Checkpoint, TensorSpec
from torchrl_sglang.weights.checkpoint.values import check_finite

__all__ = ["Checkpoint", "TensorSpec", "check_coverage", "check_finite", "is_ignored", "wire_dtype"]

_SHOWN = 10


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
    """Compare what the trainer would send with what the server's checkpoint holds.

    Args:
        specs: the trainer's tensors under checkpoint names (:meth:`WeightSource.specs`).
        checkpoint: what the server was started from.
        ignore: ``fnmatch`` patterns of names that are neither required nor sent.
        server: URL for the message; it is recorded as still holding its old weights.

    Raises:
        WeightCoverageError: listing missing and unknown names, wrong shapes and kinds of dtype, or because the
            checkpoint is quantised and the trainer's tensors are not its own.

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
    records = list(specs.values()) if isinstance(specs, Mapping) else list(specs)
    sent = {record.name: record for record in records if not is_ignored(record.name, ignore)}
    missing = [
        name
        for name in checkpoint.specs
        if name not in sent and not is_ignored(name, ignore) and not checkpoint.optional(name)
    ]
    unknown = [name for name in sent if name not in checkpoint.specs]
    mismatched = [
        line
        for name, record in sent.items()
        if name in checkpoint.specs
        for line in _mismatches(record, checkpoint.specs[name], exact_dtype=checkpoint.quantization is not None)
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


def wire_dtype(source: TensorSpec, checkpoint: Checkpoint, server_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor travels in: the server's where that is narrower, so that no byte is sent to be thrown away.

    Only matrices are narrowed: they are nearly all the bytes, while a server may keep a vector (a router's bias, a
    decay) wider than its own dtype. For the same reason a matrix that the checkpoint keeps wider than the rest stays
    wide. Widening is left to the server, which casts while loading.

    Args:
        source: the trainer's tensor.
        checkpoint: what the server was started from.
        server_dtype: what the server computes in; ``None`` sends everything as it is.

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


def _mismatches(sent: TensorSpec, stored: TensorSpec, *, exact_dtype: bool) -> list[str]:
    if sent.shape != stored.shape:
        return [f"{sent.name}: shape {sent.shape} sent, {stored.shape} in the checkpoint"]
    # An 8-bit float means nothing without its scale, so it is a kind of its own.
    same_kind = _kind(sent.dtype) == _kind(stored.dtype)
    if sent.dtype != stored.dtype and (exact_dtype or not same_kind):
        return [f"{sent.name}: dtype {_short(sent.dtype)} sent, {_short(stored.dtype)} in the checkpoint"]
    return []


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_floating_point and dtype.itemsize == 1


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _message(
    problem: str,
    server: str | None,
    missing: Sequence[str],
    unknown: Sequence[str],
    mismatched: Sequence[str],
    checkpoint: Checkpoint,
) -> str:
    known = missing or list(checkpoint.specs)
    offered = [name + (f".{hint}" if (hint := nearest_name(name, known)) else "") for name in unknown[:_SHOWN]]
    sections = [problem + (f" of {server}:" if server else ":")]
    it = {True: "it", False: "them"}
    for heading, total, lines in (
        (
            f"missing (the checkpoint has {it[len(missing) == 1]}, the trainer doesn't send {it[len(missing) == 1]})",
            len(missing),
            missing,
        ),
        (f"unknown (a server would silently ignore {it[len(unknown) == 1]})", len(unknown), offered),
        ("of another shape or kind of dtype", len(mismatched), mismatched),
    ):
        if total:
            more = [f"... and {total - _SHOWN} more"] if total > _SHOWN else []
            sections.append(f"{total} {heading}:\n" + "\n".join(f"  {line}" for line in [*lines[:_SHOWN], *more]))
    sections.append(
        "Nothing was sent. Rename with SyncConfig.name_map, or leave out on purpose with SyncConfig.ignore."
    )
    return "\n".join(sections)
