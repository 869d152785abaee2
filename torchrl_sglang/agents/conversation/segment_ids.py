"""``SegmentIds``: token ids of rendered conversations, of which each passage between special tokens is encoded once.

A tokenizer cuts a text at special tokens before it does anything else, and encodes each passage by itself. Agents of
one group, and of other tasks with the same system message and tools, have most passages in common; and so has a
conversation with its earlier turns, where the template writes them again.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from typing import Any

from torchrl_sglang.agents.conversation.kept import Kept
from torchrl_sglang.fast_tokenizers import encode_plainly
from torchrl_sglang.text_tokens import encode_untemplated, is_encodable

__all__ = ["SegmentIds"]

_LEAST = 512
"""Characters of a text below which nothing is looked up."""


class SegmentIds:
    """Encodes as :func:`~torchrl_sglang.text_tokens.encode_untemplated` does, and keeps the ids of passages.

    Used for fast tokenizers whose special tokens are cut out as they are. Of all others the whole text is encoded.

    Args:
        tokenizer: a Hugging Face tokenizer.
        most_characters: of the passages that are kept; those that were not used for longest are forgotten.
    """

    def __init__(self, tokenizer: Any, *, most_characters: int = 8 * 2**20) -> None:
        self._tokenizer = tokenizer
        self._marks = _cut_out(tokenizer)
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._marks, key=len, reverse=True))))
        self._kept: Kept[str, array[int]] = Kept(most_characters)

    def encode(self, text: str) -> array[int]:
        """Token ids of a text that has all its special tokens.

        Raises:
            ConfigError: the text holds half of a surrogate pair.
        """
        if len(text) < _LEAST or not self._marks or not is_encodable(text) or self._special_tokens_are_text():
            return self._whole(text)
        ids = array("q")
        for mark, passage in self._passages(text):
            known = self._kept.get(mark + passage)
            known = self._encoded(mark, passage) if known is None else known
            if known is None:
                return self._whole(text)
            ids += known
        return ids

    def _whole(self, text: str) -> array[int]:
        return array("q", encode_untemplated(self._tokenizer, text))

    def _special_tokens_are_text(self) -> bool:
        return bool(getattr(self._tokenizer, "split_special_tokens", False))

    def _passages(self, text: str) -> Iterator[tuple[str, str]]:
        """The passages, each with the special token before it: alone a tokenizer might take one for a text's start."""
        mark, at = "", 0
        for match in self._pattern.finditer(text):
            if match.start():
                yield mark, text[at : match.start()]
            mark, at = match[0], match.end()
        yield mark, text[at:]

    def _encoded(self, mark: str, passage: str) -> array[int] | None:
        """The ids of a passage and of the mark before it; ``None`` if the mark is not cut out."""
        ids = encode_plainly(self._tokenizer, mark + passage)
        if ids is None or (mark and ids[:1] != [self._marks[mark]]):
            return None
        made = array("q", ids)
        self._kept.put(mark + passage, made, size=len(mark) + len(passage))
        return made


def _cut_out(tokenizer: Any) -> dict[str, int]:
    """The special tokens that are cut out of a text, and their ids; empty if some take white space or letters along."""
    if encode_plainly(tokenizer, "a") is None:
        return {}
    exact = {index: token for index, token in tokenizer.added_tokens_decoder.items() if not token.normalized}
    if any(token.lstrip or token.rstrip or token.single_word for token in exact.values()):
        return {}
    return {token.content: index for index, token in exact.items() if token.content}
