"""Images, videos and sounds of a prompt, as ``/generate`` takes them: URLs, or the bytes as ``data:`` URLs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Media", "media_fields"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """The media of one prompt, in the order of the prompt's placeholders.

    Attributes:
        images: one URL per image: ``http(s)://``, which the *server* fetches, or ``data:image/...;base64,...``.
        videos: one URL per video.
        audios: one URL per sound.
    """

    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.images or self.videos or self.audios)


def media_fields(media_B: Sequence[Media]) -> dict[str, list[list[str]]]:
    """The fields of the request body for a batch, one list per prompt; kinds that no prompt has are left out.

    Examples:
        >>> media_fields([Media(images=("http://host/a.png",)), Media()])
        {'image_data': [['http://host/a.png'], []]}
    """
    fields = {
        "image_data": [list(media.images) for media in media_B],
        "video_data": [list(media.videos) for media in media_B],
        "audio_data": [list(media.audios) for media in media_B],
    }
    return {name: values for name, values in fields.items() if any(values)}
