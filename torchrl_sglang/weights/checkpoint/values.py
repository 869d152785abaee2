"""NaN and infinity in weights, found at the speed of memory and before anything is sent.

The obvious ``isfinite().all()`` makes a boolean copy and took 6.5 s for 538 MB of float32 on two loaded cores where a
plain copy took 0.04 s; the dot product of a tensor with itself took 0.05 s, and it is not finite whenever an element
is not. The rare other way round (squares that overflow) is decided exactly in a second look.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from torchrl_sglang.errors import WeightCoverageError

__all__ = ["check_finite", "finite_probe", "non_finite_names", "refuse_values"]

_DOT_MAX_NUMEL = 2**31  # BLAS counts elements in 32 bits


def finite_probe(tensor: torch.Tensor, target: torch.dtype | None = None) -> torch.Tensor:
    """A 0-d tensor on ``tensor``'s device that is NaN or infinite if any element is (and rarely otherwise).

    Args:
        tensor: any shape; integer and empty tensors give 0.
        target: dtype the tensor will be cast to; values it can't hold count as infinite.
    """
    tensor = tensor.detach()
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return torch.zeros((), device=tensor.device)
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float32)  # float8 has no reductions of its own
    limit = torch.finfo(target).max if target is not None and target.is_floating_point else torch.inf
    if tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous() and tensor.numel() < _DOT_MAX_NUMEL:
        flat = tensor.view(-1)
        squares = torch.dot(flat, flat)
        return squares if limit**2 >= torch.finfo(tensor.dtype).max else squares.where(squares <= limit**2, torch.inf)
    low, high = torch.aminmax(tensor)  # NaN if there is any
    largest = torch.maximum(-low, high).to(torch.float64)
    return largest.where(~(largest > limit), torch.inf)


def check_finite(name: str, tensor: torch.Tensor, target: torch.dtype | None = None) -> None:
    """Refuse a tensor that holds NaN or infinity, or a value its ``target`` dtype can't hold.

    Raises:
        WeightCoverageError: naming the tensor and counting its bad elements.

    Examples:
        >>> check_finite("w", torch.zeros(3))
        >>> check_finite("w", torch.tensor([0.0, float("nan")]))
        Traceback (most recent call last):
        ...
        torchrl_sglang.errors.WeightCoverageError: 1 tensor holds values no server should get:
          w: 1 of 2 elements NaN or infinite
        Nothing was sent. The trainer's weights are broken; go back to its last good checkpoint.
    """
    if bool(torch.isfinite(finite_probe(tensor, target))):
        return
    complaint = _describe(tensor, target)
    if complaint:
        refuse_values([f"{name}: {complaint}"])


def non_finite_names(tensors: Iterable[tuple[str, torch.Tensor]], target: torch.dtype | None = None) -> list[str]:
    """One line for each tensor with NaN, infinite or too large values; waits for the device once, not per tensor."""
    held = [(name, tensor.detach(), finite_probe(tensor, target)) for name, tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for position, (_, _, probe) in enumerate(held):
        by_device.setdefault(probe.device, []).append(position)
    suspects: set[int] = set()
    for positions in by_device.values():
        good = torch.isfinite(torch.stack([held[p][2].to(torch.float64) for p in positions])).tolist()
        suspects.update(p for p, fine in zip(positions, good, strict=True) if not fine)
    lines = [(held[p][0], _describe(held[p][1], target)) for p in sorted(suspects)]
    return [f"{name}: {complaint}" for name, complaint in lines if complaint]


def refuse_values(lines: list[str]) -> None:
    """Raise :class:`WeightCoverageError` if there are any ``lines`` (as :func:`non_finite_names` gives them)."""
    if not lines:
        return
    shown = "\n".join(f"  {line}" for line in lines[:10])
    more = f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else ""
    holds = "1 tensor holds" if len(lines) == 1 else f"{len(lines)} tensors hold"
    raise WeightCoverageError(
        f"{holds} values no server should get:\n{shown}{more}\n"
        "Nothing was sent. The trainer's weights are broken; go back to its last good checkpoint.",
        mismatched=lines,
    )


def _describe(tensor: torch.Tensor, target: torch.dtype | None) -> str:
    """What is wrong, element by element; empty when the probe was a false alarm. Slow, so only on suspicion."""
    wide = (
        tensor.detach().to(torch.float64).view(-1) if tensor.is_contiguous() else tensor.detach().double().reshape(-1)
    )
    broken = int((~torch.isfinite(wide)).sum())
    if broken:
        return f"{broken} of {wide.numel()} elements NaN or infinite"
    if target is not None and target.is_floating_point:
        lost = int((~torch.isfinite(wide.to(target))).sum())
        if lost:
            return f"{lost} of {wide.numel()} elements too large for the server's {str(target).removeprefix('torch.')}"
    return ""
