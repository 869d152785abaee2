"""Find NaN and infinity in weights before anything is sent, at the speed of memory.

The obvious ``isfinite().all()`` makes a boolean copy and took 6.5 s for 538 MB of float32 on two loaded cores where a
plain copy took 0.04 s. The dot product of a tensor with itself took 0.05 s, and it is not finite if any element is not.
It can also overflow for finite elements; such a tensor is then checked element by element.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from torchrl_sglang.errors import WeightCoverageError

__all__ = ["check_finite", "find_non_finite", "finite_probe", "raise_if_non_finite"]

_DOT_MAX_NUMEL = 2**31  # BLAS counts elements in 32 bits
_MAX_LISTED = 10


def check_finite(name: str, tensor: torch.Tensor, target: torch.dtype | None = None) -> None:
    """Refuse a tensor that has NaN or infinite elements, or elements that the ``target`` dtype can't represent.

    Raises:
        WeightCoverageError: naming the tensor and counting the bad elements.

    Examples:
        >>> check_finite("w", torch.zeros(3))
        >>> check_finite("w", torch.tensor([0.0, float("nan")]))
        Traceback (most recent call last):
        ...
        torchrl_sglang.errors.WeightCoverageError: 1 tensor holds values no server should get:
          w: 1 of 2 elements NaN or infinite
        Nothing was sent. The trainer's weights are broken; go back to its last good checkpoint.
    """
    raise_if_non_finite(find_non_finite([(name, tensor)], target))


def find_non_finite(tensors: Iterable[tuple[str, torch.Tensor]], target: torch.dtype | None = None) -> dict[str, str]:
    """Find the tensors with NaN, infinite or too large elements.

    Waits once for each device, not once for each tensor.

    Args:
        tensors: ``(name, tensor)`` pairs; all of them are held until the function returns. A name may occur again.
        target: dtype that the tensors will be cast to; an element that it can't represent is too large.

    Returns:
        Name to a description of the problem, for the bad tensors only, in the order of ``tensors``.
    """
    probed = [(name, tensor, finite_probe(tensor, target)) for name, tensor in tensors]
    positions_on: dict[torch.device, list[int]] = {}
    for position, (_, _, probe) in enumerate(probed):
        positions_on.setdefault(probe.device, []).append(position)
    suspects: list[int] = []
    for positions in positions_on.values():
        finite = torch.isfinite(torch.stack([probed[p][2].to(torch.float64) for p in positions])).tolist()
        suspects += [p for p, is_finite in zip(positions, finite, strict=True) if not is_finite]
    problems = ((probed[p][0], _describe_problem(probed[p][1], target)) for p in sorted(suspects))
    return {name: problem for name, problem in problems if problem}


def raise_if_non_finite(problems: Mapping[str, str]) -> None:
    """Raise :class:`WeightCoverageError` if :func:`find_non_finite` found any ``problems``."""
    if not problems:
        return
    lines = [f"{name}: {problem}" for name, problem in problems.items()]
    shown = "\n".join(f"  {line}" for line in lines[:_MAX_LISTED])
    more = f"\n  ... and {len(lines) - _MAX_LISTED} more" if len(lines) > _MAX_LISTED else ""
    holds = "1 tensor holds" if len(lines) == 1 else f"{len(lines)} tensors hold"
    raise WeightCoverageError(
        f"{holds} values no server should get:\n{shown}{more}\n"
        "Nothing was sent. The trainer's weights are broken; go back to its last good checkpoint.",
        mismatched=lines,
    )


def finite_probe(tensor: torch.Tensor, target: torch.dtype | None = None) -> torch.Tensor:
    """A scalar that is NaN or infinite if any element is, computed without waiting for the device.

    The scalar may also be infinite for finite elements with a large sum of squares.

    Args:
        tensor: any shape; integer and empty tensors give 0.
        target: dtype that the tensor will be cast to; elements that it can't represent count as infinite.

    Returns:
        Shape ``()``, on ``tensor``'s device.
    """
    tensor = tensor.detach()
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return torch.zeros((), device=tensor.device)
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float32)  # torch has no reductions for float8
    limit = torch.finfo(target).max if target is not None and target.is_floating_point else torch.inf
    if tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous() and tensor.numel() < _DOT_MAX_NUMEL:
        flat = tensor.view(-1)
        squares = torch.dot(flat, flat)
        return squares if limit**2 >= torch.finfo(tensor.dtype).max else squares.where(squares <= limit**2, torch.inf)
    low, high = torch.aminmax(tensor)  # both are NaN if any element is
    largest = torch.maximum(-low, high).to(torch.float64)
    return largest.where(~(largest > limit), torch.inf)


def _describe_problem(tensor: torch.Tensor, target: torch.dtype | None) -> str:
    """Count the bad elements one by one; empty if there are none. Slow: only for tensors with a suspicious probe."""
    values = tensor.detach().to(torch.float64)
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        return f"{bad} of {values.numel()} elements NaN or infinite"
    if target is not None and target.is_floating_point:
        too_large = int((~torch.isfinite(values.to(target))).sum())
        if too_large:
            dtype = str(target).removeprefix("torch.")
            return f"{too_large} of {values.numel()} elements too large for the server's {dtype}"
    return ""
