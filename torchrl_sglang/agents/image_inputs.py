"""The images of conversations: checked before anything is sent, and matched with what the served model takes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torchrl_sglang.agents.conversation.continuation import Prompt
from torchrl_sglang.agents.conversation.messages import Message
from torchrl_sglang.agents.image_tokens import PromptImages
from torchrl_sglang.chat.data_urls import media_url
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.protocol.messages import HttpRequest

__all__ = ["ImageInputs"]

_MODEL_INFO = HttpRequest(method="GET", path="/model_info", repeatable=True)
_ASK_TIMEOUT_S = 60.0
_KEPT_URLS = 4096
_SCHEMES = ("http", "https", "data")


class ImageInputs:
    """The images that one served model takes. Belongs to one event loop.

    Args:
        ask: sends a request to any server of the model.
        config: the checkpoint's ``config.json``, where it can be read.
    """

    def __init__(self, ask: Callable[..., Awaitable[Any]], config: Mapping[str, Any]) -> None:
        self._ask = ask
        ids = [config.get(name) for name in ("image_token_id", "image_token_index")]
        self._placeholder = next((token for token in ids if isinstance(token, int)), None)
        self._takes_images: bool | None = None
        self._known: dict[bytes, str | None] = {}

    async def checked(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with images that servers can decode.

        Raises:
            ConfigError: the model takes no images, or one is damaged, or names a file.
        """
        if not any(message.images for message in messages):
            return messages
        await self._require_model()
        checked = []
        for message in messages:
            images = tuple([replace(image, url=await self._checked_url(image.url)) for image in message.images])
            checked.append(replace(message, images=images) if images else message)
        return checked

    def of_prompt(self, prompt: Prompt, sent_ids: Sequence[int]) -> PromptImages | None:
        """The images of a prompt; ``None`` if it has none.

        Raises:
            ConfigError: the prompt's text has placeholders without an image.
        """
        urls = prompt.all_images()
        if not urls:
            return None
        places = sum(token == self._placeholder for token in sent_ids)
        if places not in (0, len(urls)):  # 0: the template writes another token than the one that is repeated
            raise ConfigError(
                f"the conversation has {len(urls)} images, but {places} places for images: is the placeholder's text "
                "in a message? Remove it"
            )
        base = prompt.base
        return PromptImages(
            urls=urls,
            num_known_sent=0 if base is None else len(base.token_ids_to_send()),
            known_ids=() if base is None else tuple(base.token_ids()),
            placeholder=self._placeholder,
        )

    async def _require_model(self) -> None:
        if self._takes_images is None:
            info = await self._ask(_MODEL_INFO, timeout_s=_ASK_TIMEOUT_S)
            # a server that does not report it says itself if it takes none
            self._takes_images = bool(info.get("has_image_understanding", True)) if isinstance(info, Mapping) else True
        if not self._takes_images:
            raise ConfigError("the served model takes text alone: send no images")

    async def _checked_url(self, url: str) -> str:
        if url.partition(":")[0].lower() not in _SCHEMES:
            raise ConfigError(
                f"the image {url[:60]!r} is no http(s):// or data: URL, and the gateway reads no files: send "
                "data:image/png;base64,..."
            )
        key = hashlib.sha256(url.encode()).digest()
        if key not in self._known:
            # in a thread: images are decoded
            checked = await asyncio.to_thread(media_url, url, "image", roots=[])
            if len(self._known) >= _KEPT_URLS:
                self._known.clear()
            self._known[key] = None if checked == url else checked
        return self._known[key] or url
