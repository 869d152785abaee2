"""Images reach the server upright and in 8 bits whatever their file, mode or metadata, or are refused by name."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchrl_sglang.chat.data_urls import media_url
from torchrl_sglang.errors import ConfigError

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
ORIENTATION = 274
# Blocks of 16 pixels, whose centres JPEG keeps nearly as they are.
BLOCKS = np.kron(np.array([[0, 90, 180], [60, 120, 240]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8))
PICTURE = np.stack([BLOCKS, 255 - BLOCKS, BLOCKS // 2], axis=-1)


def centres(values: np.ndarray) -> np.ndarray:
    return values[8::16, 8::16].astype(int)


def opened(url: str) -> Any:
    """The image as the server opens it, which ignores metadata."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(";base64,")[2], validate=True)))


def pixels(url: str) -> np.ndarray:
    return np.asarray(opened(url).convert("RGB")).astype(int)


def written(image: Any, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def turned(orientation: int) -> np.ndarray:
    """``PICTURE`` as a viewer shows it, by the table of stored rows and columns in EXIF's specification."""
    return {
        1: PICTURE,
        2: PICTURE[:, ::-1],
        3: PICTURE[::-1, ::-1],
        4: PICTURE[::-1],
        5: PICTURE.transpose(1, 0, 2),
        6: PICTURE[::-1].transpose(1, 0, 2),
        7: PICTURE[::-1, ::-1].transpose(1, 0, 2),
        8: PICTURE[:, ::-1].transpose(1, 0, 2),
    }[orientation]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_pixels_are_turned_as_the_metadata_say(format: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    data = written(Image.fromarray(PICTURE), format, exif=exif, **options)
    path = tmp_path / "picture"
    path.write_bytes(data)
    data_url = f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"
    for form in (data, path, str(path), path.as_uri(), Image.open(path), data_url):
        url = media_url(form, "image")
        assert np.abs(centres(pixels(url)) - centres(turned(orientation))).max() <= (3 if format == "JPEG" else 0)
        assert format == "JPEG" or np.array_equal(pixels(url), turned(orientation))
        assert opened(url).getexif().get(ORIENTATION, 1) == 1 or format == "TIFF"


def test_a_file_that_needs_no_change_is_sent_byte_for_byte(tmp_path: Path) -> None:
    picture = Image.fromarray(PICTURE)
    for format in ("JPEG", "PNG", "WEBP", "BMP"):
        data = written(picture, format)
        assert base64.b64decode(media_url(data, "image").partition(",")[2]) == data
    url = f"data:image/png;base64,{base64.b64encode(written(picture, 'PNG')).decode()}"
    assert media_url(url, "image") == url


MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBX", "RGBa", "La")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_colours_that_pillow_gives_it(mode: str) -> None:
    rgb = Image.fromarray(PICTURE)
    source = {"PA": "P", "La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    image = rgb.convert(source).convert(mode) if mode != "PA" else rgb.convert("P").convert("PA")
    found = opened(media_url(image, "image"))
    assert found.mode in ("L", "LA", "RGB", "RGBA")
    through = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert("RGB")
    assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(through))


def test_lab_is_converted_by_a_colour_profile() -> None:
    cms = pytest.importorskip("PIL.ImageCms")
    to_lab = cms.buildTransform(cms.createProfile("sRGB"), cms.createProfile("LAB"), "RGB", "LAB")
    muted = (64 + PICTURE // 2).astype(np.uint8)  # sRGB's corners are cut by LAB's 8 bits
    lab = cms.applyTransform(Image.fromarray(muted), to_lab)
    assert lab.mode == "LAB"
    assert np.abs(pixels(media_url(lab, "image")) - muted).max() <= 4


def test_transparency_is_kept_as_alpha_however_the_file_has_it() -> None:
    red = Image.new("P", (4, 4))
    red.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    red.putpixel((1, 1), 1)
    found = opened(media_url(written(red, "PNG", transparency=0), "image"))
    assert (found.getpixel((0, 0)), found.getpixel((1, 1))) == ((255, 0, 0, 0), (0, 0, 255, 255))
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    assert opened(media_url(written(keyed, "PNG", transparency=(1, 2, 3)), "image")).getpixel((0, 0)) == (1, 2, 3, 0)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled_and_not_cut_off(dtype: str) -> None:
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=dtype)
    image = Image.fromarray(values)
    assert image.mode.startswith("I;16")
    for form in (image, written(Image.fromarray(values.astype("<u2")), "PNG")):
        assert np.asarray(opened(media_url(form, "image"))).tolist() == [[0, 100], [200, 255]]


def test_a_mode_without_a_fixed_range_is_scaled_only_where_its_range_is_clear() -> None:
    assert np.asarray(
        opened(media_url(Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)), "image"))
    ).tolist() == [[0, 128, 255]]
    for bad in (np.array([[0, 2.5]], dtype=np.float32), np.array([[0, 70_000]], dtype=np.int32)):
        with pytest.raises(ConfigError, match="whose range of values is not fixed"):
            media_url(Image.fromarray(bad), "image")
    with pytest.raises(ConfigError, match="range of values"):
        media_url(Image.fromarray(np.array([[np.nan]], dtype=np.float32)), "image")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_sent(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = written(frames[0], format, save_all=True, append_images=frames[1:])
    found = opened(media_url(data, "image"))
    assert getattr(found, "n_frames", 1) == 1
    assert np.abs(np.asarray(found.convert("RGB"))[0, 0].astype(int) - [255, 0, 0]).max() <= 2


def test_damaged_empty_and_enormous_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        with pytest.raises(ConfigError, match="no image"):
            media_url(written(noise, format)[:-700], "image")
    for bad in (b"just text", b"\x89PNG\r\n\x1a\n" + bytes(40), b"GIF89a"):
        with pytest.raises(ConfigError, match="no image"):
            media_url(bad, "image")
    for empty in (Image.new("RGB", (0, 5)), Image.new("L", (3, 0))):
        with pytest.raises(ConfigError, match="has no pixels"):
            media_url(empty, "image")
    path = tmp_path / "cut.jpg"
    path.write_bytes(written(noise, "JPEG")[:-700])
    with Image.open(path) as lazy, pytest.raises(ConfigError, match="no image"):
        media_url(lazy, "image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ConfigError, match="too many pixels"):
        media_url(written(noise, "PNG"), "image")


def test_damaged_metadata_do_not_make_an_image_unusable() -> None:
    data = written(Image.fromarray(PICTURE), "JPEG", exif=b"Exif\x00\x00" + b"\xff" * 30)
    assert np.abs(centres(pixels(media_url(data, "image"))) - centres(PICTURE)).max() <= 3
    for orientation in (0, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        assert np.array_equal(pixels(media_url(written(Image.fromarray(PICTURE), "PNG", exif=exif), "image")), PICTURE)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64,####", "is not base64"),
        ("data:image/png,abc", "no data URL with base64"),
        ("data:image/png;base64,AA==", "no image"),
        ("data:audio/wav;base64,UklGRgAAAABXQVZF", "expected image, found audio/wav"),
    ],
)
def test_a_data_url_is_looked_into(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        media_url(url, "image")


def test_a_videos_frames_are_upright_and_in_eight_bits() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    frame = Image.open(io.BytesIO(written(Image.fromarray(PICTURE), "PNG", exif=exif)))
    deep = Image.fromarray(np.full(PICTURE.shape[1::-1], 65535, dtype=np.uint16))
    data = base64.b64decode(media_url([frame, deep], "video").partition(",")[2])
    starts = [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"]
    shown = [np.asarray(Image.open(io.BytesIO(data[at:])).convert("RGB")).astype(int) for at in starts]
    assert np.abs(centres(shown[0]) - centres(turned(6))).max() <= 3
    assert shown[1].min() >= 253
    with pytest.raises(ConfigError, match="fps must be positive"):
        media_url({"frames": [frame], "fps": 0}, "video")


def test_masks_and_other_arrays_of_rates_and_channels() -> None:
    assert np.asarray(opened(media_url(np.array([[True, False]]), "image"))).tolist() == [[255, 0]]
    sound = np.zeros((2, 400), dtype=np.int16)
    for rate in (16000, np.int64(16000), 16000.0):
        data = base64.b64decode(media_url((sound, rate), "audio").partition(",")[2])
        assert (data[22], int.from_bytes(data[24:28], "little")) == (2, 16000)
    for bad in (True, 0.5, -1, "16000"):
        with pytest.raises(ConfigError, match="a sound is a path"):
            media_url((sound, bad), "audio")
