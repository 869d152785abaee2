"""SGLang's two hash functions of a tensor's bytes: one for tensors in main memory, one for tensors on a GPU.

Source: SGLang 0.5.23, ``tensor_hash`` and ``gpu_tensor_hash``. The second is written here in torch, so that a trainer
can compute it on any device. It was compared with a transcription in plain Python, not yet with a GPU's own result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

__all__ = ["HashFunction", "gpu_hash", "hash_function", "main_memory_hash"]

HashFunction = Callable[[torch.Tensor], str]
"""From a tensor to 16 hex digits."""

_TILE_WORDS = 8192
_CHUNK_TILES = 128
"""Tiles that are hashed at once: 4 MB of weights, for which the computation takes some 60 MB."""
_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK_32)
_POSITION_FACTORS = (0x27D4EB2D, 0x165667B1)
_ROTATIONS = (15, 13)


def hash_function(device: str) -> HashFunction:
    """The function by which a server on this device (``ServerInfo.device``) hashes."""
    return gpu_hash if device == "cuda" else main_memory_hash


def main_memory_hash(tensor: torch.Tensor) -> str:
    """First 8 bytes of sha256 over a tensor's bytes.

    Examples:
        >>> main_memory_hash(torch.tensor([1.0, 2.0]))
        'b9c80b5adeca4507'
    """
    flat = _as_bytes(tensor).cpu()
    digest = hashlib.sha256(flat.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
    return digest.hexdigest()[:16]


def gpu_hash(tensor: torch.Tensor) -> str:
    """Sum over tiles of 8192 words of two mixed 32-bit sums, which depend on each word and its position."""
    flat = _as_bytes(tensor)
    if flat.numel() == 0:
        return f"{0:016x}"
    missing = -flat.numel() % 4
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    if flat.storage_offset() % 4:
        flat = flat.clone()
    words = flat.view(torch.int32)
    total = 0
    for start in range(0, words.numel(), _TILE_WORDS * _CHUNK_TILES):
        total += _hash_tiles(words[start : start + _TILE_WORDS * _CHUNK_TILES], start, words.numel())
    return f"{_splitmix_64(total & _MASK_64):016x}"


def _hash_tiles(words: torch.Tensor, start: int, num_words: int) -> int:
    """The sum of the hashes of some tiles; 32-bit unsigned arithmetic in 64-bit signed integers."""
    values = words.to(torch.int64) & _MASK_32
    index = torch.arange(start, start + words.numel(), device=words.device) & _MASK_32
    num_bytes = num_words * 4 & _MASK_32
    halves = []
    for seed, factor, rotation in zip(_SEEDS, _POSITION_FACTORS, _ROTATIONS, strict=True):
        position = ((index * factor + seed) & _MASK_32) ^ ((index << rotation | index >> (32 - rotation)) & _MASK_32)
        mixed = _mix_32(values ^ position)
        mixed = torch.nn.functional.pad(mixed, (0, -mixed.numel() % _TILE_WORDS))
        sums = mixed.view(-1, _TILE_WORDS).sum(dim=1) & _MASK_32
        halves.append(_mix_32(sums ^ num_bytes))
    return (int(halves[0].sum()) << 32) + int(halves[1].sum())


def _mix_32(x: torch.Tensor) -> torch.Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK_32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK_32
    return x ^ (x >> 16)


def _splitmix_64(x: int) -> int:
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & _MASK_64
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
