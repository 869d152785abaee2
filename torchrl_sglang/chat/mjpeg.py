"""Frames as a motion-JPEG AVI file, written without a video library; every common decoder reads it."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any

from torchrl_sglang.errors import ConfigError

__all__ = ["write_avi"]

_JPEG_QUALITY = 95
_HAS_INDEX = 0x10
_KEY_FRAME = 0x10


def write_avi(frames: Sequence[Any], *, fps: float) -> bytes:
    """The frames as the bytes of an AVI file.

    Source: Microsoft's AVI RIFF file reference (``avih``, ``strh``, ``strf``, ``movi``, ``idx1``).

    Args:
        frames: ``PIL.Image`` objects of one size.
        fps: frames per second.

    Raises:
        ConfigError: no frames, frames of different sizes, or a bad ``fps``.
    """
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ConfigError(f"a video needs frames of one size, got {len(frames)} of sizes {sorted(sizes)}")
    if not 0 < fps < float("inf"):
        raise ConfigError(f"fps must be positive, got {fps}")
    width, height = sizes.pop()
    pictures = [_jpeg(frame) for frame in frames]
    largest = max(len(picture) for picture in pictures)
    per_frame_us, rate = round(1e6 / fps), round(fps * 1000)
    main = struct.pack(
        "<10I16x", per_frame_us, round(largest * fps), 0, _HAS_INDEX, len(frames), 0, 1, largest, width, height
    )
    stream = b"vidsMJPG" + struct.pack(
        "<IHHIIIIIIiI4H", 0, 0, 0, 0, 1000, rate, 0, len(frames), largest, -1, 0, 0, 0, width, height
    )
    bitmap = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0)
    movie, index = b"movi", b""
    for picture in pictures:
        index += b"00dc" + struct.pack("<III", _KEY_FRAME, len(movie), len(picture))
        movie += _chunk(b"00dc", picture)
    header = b"hdrl" + _chunk(b"avih", main)
    header += _chunk(b"LIST", b"strl" + _chunk(b"strh", stream) + _chunk(b"strf", bitmap))
    return _chunk(b"RIFF", b"AVI " + _chunk(b"LIST", header) + _chunk(b"LIST", movie) + _chunk(b"idx1", index))


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _jpeg(frame: Any) -> bytes:
    file = io.BytesIO()
    frame.convert("RGB").save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
