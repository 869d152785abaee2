"""Images, videos and sounds in every form become URLs with exactly their content."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from torchrl_sglang.chat.data_urls import media_url
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.protocol.generate import build_generate
from torchrl_sglang.protocol.media import Media

image = pytest.importorskip("PIL.Image")
PIXELS = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)


def content(url: str) -> bytes:
    return base64.b64decode(url.partition(";base64,")[2], validate=True)


def pixels(url: str) -> np.ndarray:
    return np.asarray(image.open(io.BytesIO(content(url))))


def test_an_image_is_the_same_in_every_form(tmp_path: Path) -> None:
    picture = image.fromarray(PIXELS)
    path = tmp_path / "picture.png"
    picture.save(path)
    tensor = torch.from_numpy(PIXELS.copy())
    forms = [path, str(path), f"file://{path}", path.read_bytes(), bytearray(path.read_bytes()), picture, PIXELS]
    forms += [
        PIXELS / 255,
        np.moveaxis(PIXELS, -1, 0),
        tensor.permute(2, 0, 1),
        tensor,
    ]
    for form in forms:
        url = media_url(form, "image")
        assert url.startswith("data:image/png;base64,")
        assert np.array_equal(pixels(url), PIXELS)
    assert pixels(media_url(PIXELS[..., 0], "image")).shape == (6, 5)
    assert pixels(media_url(torch.zeros(1, 4, 5), "image")).shape == (4, 5)
    for url in ("https://host/a.png", media_url(PIXELS, "image")):
        assert media_url(url, "image") == url


def test_a_tensor_of_three_rows_and_columns_has_its_channels_first_and_an_array_last() -> None:
    values = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(pixels(media_url(values, "image")), values)
    assert np.array_equal(pixels(media_url(torch.from_numpy(values), "image")), np.moveaxis(values, 0, -1))


@pytest.mark.parametrize(
    ("item", "kind", "words"),
    [
        ("no/such/file.png", "image", "can't be read"),
        (b"", "image", "expected image, found nothing"),
        (b"RIFF....WAVEfmt ", "image", "expected image, found audio/wav"),
        (b"\x89PNG\r\n\x1a\n...", "audio", "expected audio, found image/png"),
        (np.zeros((2, 2, 2)), "image", "an image is a path"),
        (np.zeros((0, 2, 3)), "image", "an image is a path"),
        (np.full((2, 2, 3), 2.0), "image", r"values in \[0, 1\]"),
        (np.full((2, 2, 3), np.nan), "image", r"values in \[0, 1\]"),
        (np.zeros((2, 2, 3), dtype=np.int64), "image", "uint8 or floating point"),
        (np.zeros((2, 2, 3)), "video", "4 dimensions"),
        ([], "video", "frames of one size"),
        ({"frames": np.zeros((2, 4, 4, 3)), "fps": -1}, "video", "fps must be positive"),
        (np.zeros(5), "audio", "a sound is a path"),
        ((np.zeros(5), 0), "audio", "a sound is a path"),
        ((np.zeros((5, 9)), 16000), "audio", "samples must have shape"),
        ((np.full(5, 1.5), 16000), "audio", r"in \[-1, 1\]"),
        ((np.zeros(5, dtype=np.int32), 16000), "audio", "int16 or floating point"),
    ],
)
def test_media_of_the_wrong_kind_or_shape_are_refused_with_the_reason(item: object, kind: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        media_url(item, kind)


def test_a_sound_keeps_its_samples_and_rate() -> None:
    samples = np.array([0.0, 1.0, -1.0, 0.5], dtype=np.float32)
    for form in ((samples, 16000), {"array": samples, "sampling_rate": 16000}, (torch.from_numpy(samples), 16000)):
        with wave.open(io.BytesIO(content(media_url(form, "audio")))) as sound:
            assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16000, 1, 2)
            assert np.frombuffer(sound.readframes(9), "<i2").tolist() == [0, 32767, -32767, 16384]


def test_frames_become_a_video_whose_index_finds_every_frame() -> None:
    frames = [np.full((16, 24, 3), value, dtype=np.uint8) for value in (10, 120, 250)]
    data = content(media_url({"frames": frames, "fps": 4}, "video"))
    assert data[:4] + data[8:12] == b"RIFFAVI "
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
    movie = data.index(b"movi")
    index = data.index(b"idx1") + 8
    shades = []
    for entry in range(3):
        offset = int.from_bytes(data[index + 16 * entry + 8 : index + 16 * entry + 12], "little")
        size = int.from_bytes(data[index + 16 * entry + 12 : index + 16 * entry + 16], "little")
        start = movie + offset + 8
        shades.append(round(float(np.asarray(image.open(io.BytesIO(data[start : start + size]))).mean())))
    assert shades == pytest.approx([10, 120, 250], abs=2)
    array = np.stack(frames)
    assert media_url({"frames": torch.from_numpy(array).permute(0, 3, 1, 2), "fps": 4}, "video") == media_url(
        {"frames": array, "fps": 4}, "video"
    )


def test_media_are_sent_beside_the_prompt_they_belong_to() -> None:
    media = [Media(images=("u", "v"), audios=("s",)), Media()]
    body = build_generate([[1], [2]], SamplingParams(), media=media).body
    assert body is not None
    assert body["image_data"] == [["u", "v"], []]
    assert body["audio_data"] == [["s"], []]
    assert "video_data" not in body
    assert "image_data" not in (build_generate([[1]], SamplingParams()).body or {})
