"""The tokens that a server makes of a prompt's images.

A prompt is sent with *one* placeholder per image, as the chat template writes it. The server puts as many tokens in its
place as the image takes, and tells the result (``prompt_token_ids``, ``prompt_tokens``). That is what is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.errors import ConfigError

__all__ = ["PromptImages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptImages:
    """The images of one prompt, and what is known of their tokens.

    Attributes:
        urls: the images, in the order of their placeholders.
        num_known_sent: length of the prompt's beginning whose tokens on the server are known from an earlier turn.
        known_ids: those tokens.
        placeholder: id of the token that stands for an image; ``None`` if the checkpoint does not say it.
    """

    urls: tuple[str, ...]
    num_known_sent: int = 0
    known_ids: tuple[int, ...] = ()
    placeholder: int | None = None

    def seen_by_server(self, sent_ids: Sequence[int], reported_ids: Any, count: int, *, server: str) -> list[int]:
        """The prompt as the server saw it.

        Most of SGLang's models report it whole. Those that put the images in later report what was sent, and the right
        number of tokens: then the tokens of one new image are known from the difference.

        Args:
            sent_ids: what was sent.
            reported_ids: ``prompt_token_ids`` of the answer.
            count: ``prompt_tokens`` of the answer.
            server: base URL of the server, for errors.

        Raises:
            ConfigError: the server does not report the tokens of prompts, or how many each image takes can't be known.

        Examples:
            >>> images = PromptImages(urls=("http://host/a.png",), placeholder=9)
            >>> images.seen_by_server([5, 9, 6], [5, 9, 9, 9, 6], 5, server="http://host")
            [5, 9, 9, 9, 6]
            >>> images.seen_by_server([5, 9, 6], [5, 9, 6], 5, server="http://host")
            [5, 9, 9, 9, 6]
        """
        if not isinstance(reported_ids, list) or not all(type(token) is int for token in reported_ids):
            raise ConfigError(
                f"{server} does not report the tokens of prompts with images (return_prompt_token_ids), so they can't "
                "be recorded: images need a newer SGLang"
            )
        if len(reported_ids) == count:
            return reported_ids
        if reported_ids != list(sent_ids) or len(reported_ids) > count:
            raise ConfigError(
                f"{server} reports a prompt with images of {len(reported_ids)} tokens, and counts {count}: which "
                "tokens it saw is not known, so the turn can't be recorded. Send text alone to this model"
            )
        tail = list(sent_ids[self.num_known_sent :])
        places = [at for at, token in enumerate(tail) if token == self.placeholder]
        extra = count - len(self.known_ids) - len(tail)
        if extra and len(places) != 1:
            raise ConfigError(
                f"{server} does not report how many tokens each of several new images takes with this model, so the "
                "turn can't be recorded exactly: send one new image per request"
            )
        if extra:
            tail[places[0] : places[0]] = [self.placeholder or 0] * extra
        return [*self.known_ids, *tail]
