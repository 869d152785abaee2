"""The fake model: log-probabilities are a fixed function of the weights' checksums and of the preceding tokens.

Like a real model it keeps a key-value state per position, so a prefix cached under old weights gives other answers than
one computed under the new. Tests can compute what a server must report: :func:`logprobs` of a trainer's tensors equals
the log-probabilities from a fake server that holds the same tensors.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

__all__ = ["Weights", "advance", "logits_after", "logprobs", "read_checkpoint", "signature"]

_MASK = (1 << 63) - 1


def read_checkpoint(model_path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, by name.

    Raises:
        FileNotFoundError: the folder holds no safetensors file.
    """
    files = sorted(Path(model_path).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {model_path}")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            tensors.update((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
    return tensors


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers


class Weights:
    """The tensors one rank holds, and their checksums.

    Args:
        tensors: tensors by name; neither copied nor written to: an update replaces them.
        dtype: dtype of every floating-point tensor held; ``None`` keeps each tensor's own.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
        self.tensors = {name: self._cast(tensor, dtype) for name, tensor in tensors.items()}
        self.checksums = {name: checksum(tensor) for name, tensor in self.tensors.items()}
        self.signature = _fold(self.checksums)
        """One number for all the weights."""

    @staticmethod
    def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def load(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace tensors, cast to the dtypes held; names that are not held are ignored, as SGLang does.

        Raises:
            ValueError: a shape differs. The tensors before it have been replaced.
        """
        try:
            for name, tensor in named:
                held = self.tensors.get(name)
                if held is None:
                    continue
                if held.shape != tensor.shape:
                    raise ValueError(f"Attempted to load weight ({tensor.shape}) into parameter ({held.shape})")
                self.tensors[name] = tensor.to(held.dtype, copy=True)
                self.checksums[name] = checksum(self.tensors[name])
        finally:
            self.signature = _fold(self.checksums)


def _fold(checksums: Mapping[str, int]) -> int:
    return zlib.crc32(json.dumps(sorted(checksums.items())).encode())


def signature(tensors: Mapping[str, torch.Tensor]) -> int:
    """The :attr:`Weights.signature` of a server that holds these tensors (same names, dtypes and values)."""
    return _fold({name: checksum(tensor) for name, tensor in tensors.items()})


def advance(state: int, token: int, weights: int) -> int:
    """The key-value state after one more token, computed under the weights with this signature."""
    return (state * 6364136223846793005 + (token + 1) * 1442695040888963407 + weights * 2862933555777941757 + 1) & _MASK


def logits_after(state: int, weights: int, vocab_size: int) -> torch.Tensor:
    """Next-token logits, float32 ``[vocab_size]``, from the state of all positions and the current weights."""
    generator = torch.Generator().manual_seed((state ^ (weights * 0x9E3779B97F4A7C15)) & _MASK)
    return 2.0 * torch.randn(vocab_size, generator=generator)


def logprobs(weights: int, tokens: Sequence[int], vocab_size: int) -> list[float | None]:
    """Natural-log probability of each token given those before it; the first is ``None``.

    Examples:
        >>> logprobs(1, [3, 1], 8) == logprobs(1, [3, 1], 8), logprobs(2, [3, 1], 8) == logprobs(1, [3, 1], 8)
        (True, False)
    """
    out: list[float | None] = []
    state = 0
    for i, token in enumerate(tokens):
        if i == 0:
            out.append(None)
        else:
            out.append(float(torch.log_softmax(logits_after(state, weights, vocab_size), -1)[token]))
        state = advance(state, token, weights)
    return out
