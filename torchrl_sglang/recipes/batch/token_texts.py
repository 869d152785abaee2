"""The text of single tokens, for pictures of what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

__all__ = ["token_texts"]

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token.

    Args:
        tokenizer: byte-level (GPT-2's kind) or SentencePiece.
        ids: token ids.

    Returns:
        One text per id; the character U+FFFD stands for a token that is part of a character.
    """
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    blank = tokenizer.convert_tokens_to_ids("Ġ")
    if blank is not None and blank != tokenizer.unk_token_id:
        characters = byte_of_character()
        return [
            bytes(characters[c] for c in piece).decode(errors="replace") if characters.keys() >= set(piece) else piece
            for piece in pieces
        ]
    return [
        bytes([int(found[1], 16)]).decode(errors="replace")
        if (found := _BYTE_FALLBACK.fullmatch(piece))
        else piece.replace("▁", " ")
        for piece in pieces
    ]


@cache
def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable bytes stand for themselves, the others for the characters from U+0100 on, in order (GPT-2's table).

    Examples:
        >>> byte_of_character()["Ġ"], byte_of_character()["Ċ"], byte_of_character()["a"]
        (32, 10, 97)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
