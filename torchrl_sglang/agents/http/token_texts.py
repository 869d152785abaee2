"""``TokenTexts``: the text and the bytes of single tokens, as ``logprobs`` reports them."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

__all__ = ["TokenIdTexts", "TokenTexts"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Texts of a tokenizer's tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._byte_level = _is_byte_level(tokenizer)
        self._special = frozenset(getattr(tokenizer, "added_tokens_decoder", {}))
        self.text_and_bytes = lru_cache(maxsize=65536)(self._text_and_bytes)

    def _text_and_bytes(self, token_id: int) -> tuple[str, tuple[int, ...]]:
        """A token's text, with ``�`` for half characters, and its bytes in UTF-8."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # an id without a token, of a vocabulary that is padded
            return "", ()
        data = self._bytes(token_id, str(piece))
        return data.decode(errors="replace"), tuple(data)

    def _bytes(self, token_id: int, piece: str) -> bytes:
        if token_id in self._special:
            return piece.encode()
        if self._byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        byte = _BYTE_TOKEN.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        return piece.replace("▁", " ").encode()


class TokenIdTexts:
    """Token ids in place of tokens' texts: ``token_id:5``, as vLLM writes them where ``return_tokens_as_token_ids``.

    Args:
        texts: the texts; the bytes are still those.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def text_and_bytes(self, token_id: int) -> tuple[str, tuple[int, ...]]:
        """``token_id:N``, and the token's bytes in UTF-8."""
        return f"token_id:{token_id}", self._texts.text_and_bytes(token_id)[1]


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


_BYTES = _byte_characters()


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return True  # the slow tokenizers that are left are GPT-2's kind
    parts = json.loads(backend.to_str())
    return '"ByteLevel"' in json.dumps([parts.get("decoder"), parts.get("pre_tokenizer")])
