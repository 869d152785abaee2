"""Images as every server decodes them: upright, in 8 bits, grey or RGB with or without alpha."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchrl_sglang.errors import ConfigError

__all__ = ["as_png", "check_image", "upright"]

_PLAIN_MODES = ("L", "LA", "RGB", "RGBA")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
# Of these, PIL and with it the server decodes the pixels alike, whatever else the file holds.
_PLAIN_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_NOT_READ_HERE = ("image/heic", "image/avif")  # need plugins of Pillow, which the server may have


@contextmanager
def _unreadable(what: str) -> Iterator[None]:
    """Translate what Pillow raises for damaged, truncated and oversized images."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Image.DecompressionBombError as error:
        raise ConfigError(
            f"{what} has too many pixels: {error}. Make it smaller, or raise Image.MAX_IMAGE_PIXELS"
        ) from error
    except UnidentifiedImageError as error:
        raise ConfigError(f"{what} is no image: its format is not known to Pillow") from error
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, struct.error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what} is no image that can be decoded: {error}") from error


def upright(image: Any, what: str = "this image") -> Any:
    """A Pillow image with its pixels turned as its EXIF orientation says, in mode L, LA, RGB or RGBA.

    Servers ignore the orientation. Sixteen-bit grey is scaled to 8 bits, whose range other readers would cut off.

    Args:
        image: a ``PIL.Image``; of an animation its current frame.
        what: its name in error messages.

    Raises:
        ConfigError: it can't be decoded, has no pixels, or has a mode whose range of values is not fixed.
    """
    with _unreadable(what):
        image.load()
        if 0 in image.size:
            raise ConfigError(f"{what} has no pixels: its size is {image.size}")
        return _plain(_turn(image), what)


def check_image(data: bytes, mime: str | None, what: str) -> bytes | None:
    """The bytes of an image file as a PNG if they need a change; ``None`` if they can be sent as they are.

    Args:
        data: the file's bytes.
        mime: type by its first bytes, if that is known.
        what: its name in error messages.

    Raises:
        ConfigError: the image can't be decoded.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        return None  # without Pillow, files are sent unread
    with _unreadable(what):
        try:
            image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            if mime in _NOT_READ_HERE:
                return None
            raise
        first = upright(image, what)
        is_plain = image.format in _PLAIN_FORMATS and image.mode == first.mode and _orientation(image) == 1
        return None if is_plain and getattr(image, "n_frames", 1) == 1 else as_png(first)


def as_png(image: Any) -> bytes:
    """A Pillow image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1, icc_profile=None)  # a profile may be of the mode before
    return file.getvalue()


def _orientation(image: Any) -> int:
    from PIL.ExifTags import Base

    try:
        found = image.getexif().get(Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return 1  # damaged metadata: the pixels count
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _turn(image: Any) -> Any:
    """The image with its pixels turned; the orientation as in EXIF's specification, 1 is upright."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _plain(image: Any, what: str) -> Any:
    import numpy as np
    from PIL import Image

    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.round(values.clip(0, 65535) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" and values.min() >= 0 and values.max() <= 1:
            return Image.fromarray(np.round(values * 255).astype(np.uint8))
        raise ConfigError(
            f"{what} has mode {image.mode}, whose range of values is not fixed (here {values.min():g} to "
            f"{values.max():g}): scale it and convert it to mode L or RGB"
        )
    if image.mode in _PLAIN_MODES and "transparency" not in image.info:
        return image
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode == "1":
        return image.convert("L")
    has_alpha = "transparency" in image.info or image.mode in ("PA", "La", "LA", "RGBa", "RGBA")
    steps = {"La": ("LA", "RGBA"), "RGBa": ("RGBA",)}.get(image.mode, ("RGBA" if has_alpha else "RGB",))
    for mode in steps:
        image = image.convert(mode)
    return image


def _from_lab(image: Any) -> Any:
    from PIL import ImageCms

    transform = ImageCms.buildTransform(
        ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), inMode="LAB", outMode="RGB"
    )
    return ImageCms.applyTransform(image, transform)
