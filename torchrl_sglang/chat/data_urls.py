"""Images, videos and sounds as the URLs that ``/generate`` takes."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from torchrl_sglang.chat.image_files import as_png, check_image, upright
from torchrl_sglang.chat.media_files import MediaKind, read_media_file
from torchrl_sglang.chat.mjpeg import write_avi
from torchrl_sglang.errors import ConfigError

__all__ = ["MediaKind", "media_url"]

# (offset, bytes at that offset, MIME type of the file)
_SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (0, b"BM", "image/bmp"),
    (0, b"II*\x00", "image/tiff"),
    (0, b"MM\x00*", "image/tiff"),
    (4, b"ftypavif", "image/avif"),
    (4, b"ftypheic", "image/heic"),
    (4, b"ftypM4A", "audio/mp4"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1aE\xdf\xa3", "video/webm"),
    (8, b"AVI ", "video/x-msvideo"),
    (8, b"WAVE", "audio/wav"),
    (0, b"ID3", "audio/mpeg"),
    *((0, bytes([0xFF, byte]), "audio/mpeg") for byte in (0xFB, 0xFA, 0xF3, 0xF2)),
    (0, b"fLaC", "audio/flac"),
    (0, b"OggS", "audio/ogg"),
)
# The second kind of media that a container may hold.
_SECOND_KIND = {"image/gif": "video", "video/mp4": "audio", "video/webm": "audio", "audio/ogg": "video"}
_MAX_CHANNELS = 8
_SURELY_SAMPLES = 256
# SGLang's image processors sample at most two frames per second, so none is dropped.
_FRAMES_PER_S = 2.0


def media_url(item: Any, kind: MediaKind, *, roots: Sequence[Path] | None = None) -> str:
    """One image, video or sound as a URL.

    Images are decoded once, so that a damaged one is refused here. Those that servers would show turned, cut off or
    transparent (EXIF orientation, 16 bits, CMYK, palettes, animations) become an upright PNG; the others are sent as
    they are. What an ``http(s)://`` URL names is fetched by the *server*, and not looked at.

    Args:
        item: a path, the bytes of a file, an ``http(s)://``, ``file://`` or ``data:`` URL, or

            * image: a ``PIL.Image``; an array or tensor of shape ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``, either
              uint8, boolean, or floating point in [0, 1];
            * video: a list of images, an array of shape ``(frames, H, W, C)`` or ``(frames, C, H, W)``, or
              ``{"frames": ..., "fps": ...}``; sent as motion JPEG;
            * audio: ``(samples, rate)`` or ``{"array": ..., "sampling_rate": ...}`` with samples of shape ``(N,)``,
              ``(N, channels)`` or ``(channels, N)``, int16 or floating point in [-1, 1]; sent as 16-bit WAV.
        kind: the kind of media.
        roots: folders from which files may be read; ``None`` reads any file. Links are followed first.

    Raises:
        ConfigError: no such file, a file that may not be read or is of another kind, or values of the wrong shape,
            type or range.

    Examples:
        >>> media_url("https://host/cat.png", "image")
        'https://host/cat.png'
        >>> media_url(np.zeros((2, 2, 3), dtype=np.uint8), "image")[:30]
        'data:image/png;base64,iVBORw0K'
        >>> media_url("/etc/passwd", "image", roots=[])
        Traceback (most recent call last):
        torchrl_sglang.errors.ConfigError: the image '/etc/passwd' is a local file in a message, and no folder is ...
    """
    if isinstance(item, str):
        scheme = item.partition(":")[0].lower()
        if scheme in ("http", "https"):
            return item
        if scheme == "data":
            return _checked_data_url(item, kind)
    if isinstance(item, (str, Path)):
        return _as_data_url(read_media_file(item, kind, roots), kind, f"the file {str(item)!r}")
    if isinstance(item, (bytes, bytearray, memoryview)):
        return _as_data_url(bytes(item), kind, "these bytes")
    encode = {"image": _png, "video": _avi, "audio": _wav}[kind]
    return _as_data_url(encode(item), kind, f"this {type(item).__name__}", encoded=True)


def _checked_data_url(url: str, kind: MediaKind) -> str:
    """The URL itself if the server can decode its content, else one with the content that it can."""
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ConfigError(f"the {kind} {url[:60]!r} is no data URL with base64: give data:{kind}/...;base64,...")
    try:
        data = base64.b64decode("".join(unquote(body).split()), validate=True)
    except ValueError as error:
        raise ConfigError(f"the {kind} {url[:60]!r} is not base64: {error}") from error
    checked = _as_data_url(data, kind, f"the data URL {url[:40]!r}...")
    return url if base64.b64decode(checked.partition(",")[2]) == data else checked


def _as_data_url(data: bytes, kind: MediaKind, what: str, *, encoded: bool = False) -> str:
    found = _mime(data)
    if not data or (found is not None and kind not in (found.split("/")[0], _SECOND_KIND.get(found))):
        raise ConfigError(f"wrong content in {what}: expected {kind}, found {found or 'nothing'}")
    if kind == "image" and not encoded:
        changed = check_image(data, found, what)
        data, found = (data, found) if changed is None else (changed, "image/png")
    mime = found if found is not None and found.startswith(kind) else f"{kind}/{found.split('/')[1] if found else '*'}"
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _mime(data: bytes) -> str | None:
    return next((mime for at, mark, mime in _SIGNATURES if data[at : at + len(mark)] == mark), None)


def _as_array(values: Any) -> np.ndarray[Any, Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.dtype.is_floating_point else values
    return np.asarray(values)


def as_pillow(image: Any) -> Any:
    """An image in any form as an upright ``PIL.Image``, in grey or RGB, with or without alpha."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("images that are not files need Pillow: pip install pillow") from error
    if isinstance(image, Image.Image):
        return upright(image)
    pixels = _as_array(image)
    channels_first = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4)
    if channels_first and (pixels.shape[-1] not in (1, 3, 4) or hasattr(image, "detach")):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.size == 0 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (3, 4)):
        raise ConfigError(
            f"an image is a path, bytes, a URL, a PIL image or an array of shape (H, W), (H, W, C) or (C, H, W); got "
            f"{type(image).__name__} of shape {pixels.shape}"
        )
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    if np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ConfigError("a floating-point image must have values in [0, 1]; was it normalised for a model?")
        pixels = np.round(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ConfigError(f"an image's values must be uint8 or floating point in [0, 1], got {pixels.dtype}")
    return Image.fromarray(pixels)


def _png(image: Any) -> bytes:
    return as_png(as_pillow(image))


def _avi(video: Any) -> bytes:
    frames, fps = (video["frames"], video.get("fps")) if isinstance(video, Mapping) else (video, None)
    if not isinstance(frames, Sequence):
        frames = _as_array(frames) if not hasattr(frames, "detach") else frames
        if frames.ndim != 4:
            raise ConfigError(f"a video's array must have 4 dimensions, frames first; got shape {tuple(frames.shape)}")
    return write_avi([as_pillow(frame) for frame in frames], fps=_FRAMES_PER_S if fps is None else float(fps))


def _is_rate(rate: Any) -> bool:
    return isinstance(rate, (int, float, np.integer, np.floating)) and rate == int(rate) > 0 and rate is not True


def _wav(audio: Any) -> bytes:
    if isinstance(audio, Mapping) and "array" in audio and "sampling_rate" in audio:
        audio = (audio["array"], audio["sampling_rate"])
    if not (isinstance(audio, tuple) and len(audio) == 2 and _is_rate(audio[1])):
        raise ConfigError(
            "a sound is a path, bytes, a URL, (samples, rate) or {'array': samples, 'sampling_rate': rate}; "
            f"got {type(audio).__name__}"
        )
    samples, rate = _as_array(audio[0]), int(audio[1])
    if samples.ndim == 2 and samples.shape[0] <= _MAX_CHANNELS and samples.shape[1] >= _SURELY_SAMPLES:
        samples = samples.T  # torchaudio's order
    if samples.size == 0 or samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[1] > _MAX_CHANNELS):
        raise ConfigError(f"samples must have shape (N,) or (N, channels), got {samples.shape}")
    if np.issubdtype(samples.dtype, np.floating):
        if not np.abs(samples).max() <= 1:
            raise ConfigError("floating-point samples must lie in [-1, 1]")
        samples = np.round(samples * 32767).astype("<i2")
    if samples.dtype != np.int16:
        raise ConfigError(f"samples must be int16 or floating point in [-1, 1], got {samples.dtype}")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()
