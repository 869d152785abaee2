"""Text to token ids, with the special tokens that a tokenizer adds, none of them twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["encode_texts", "encode_untemplated", "special_ids"]

_PROBE = "a"


def encode_texts(
    tokenizer: Any, texts_B: Sequence[str], options: Mapping[str, Any] | None = None, *, open_end: bool = False
) -> list[list[int]]:
    """Token ids of texts, as ``tokenizer(texts)`` gives them, but for two things.

    A text that has the tokenizer's first or last special tokens already (a rendered chat template, or text from an
    earlier step) does not get them again. With ``open_end`` the text is a prompt, which the model continues: the
    end-of-sequence token that some tokenizers add (``add_eos_token``) is left out.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts_B: the texts.
        options: arguments of the tokenizer, e.g. ``{"add_special_tokens": False}``.
        open_end: whether the model continues the texts.
    """
    texts = list(texts_B)
    options = dict(options or {})
    ids_B_T = [list(ids_T) for ids_T in tokenizer(texts, **options)["input_ids"]] if texts else []
    if not options.get("add_special_tokens", True) or not hasattr(tokenizer, "num_special_tokens_to_add"):
        return ids_B_T
    first, last = _added_ids(tokenizer)
    ends = open_end and last[-1:] == [tokenizer.eos_token_id]
    for index, ids_T in enumerate(ids_B_T):
        count = len(first)
        if count and ids_T[:count] == first == ids_T[count : 2 * count]:
            ids_T = ids_T[count:]
        count = len(last)
        if count and ids_T[-count:] == last and (ends or ids_T[-2 * count : -count] == last):
            ids_T = ids_T[:-count]
        ids_B_T[index] = ids_T
    return ids_B_T


def encode_untemplated(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that has all its special tokens, such as a rendered chat template."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of all special tokens: those with a role (BOS, EOS...) and those added as special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    marked = [index for index, token in added.items() if getattr(token, "special", False)]
    return frozenset(map(int, [*tokenizer.all_special_ids, *marked]))


def _added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after every text."""
    whole = list(tokenizer(_PROBE)["input_ids"])
    bare = encode_untemplated(tokenizer, _PROBE)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
