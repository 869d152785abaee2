"""Text to token ids, with the special tokens that a tokenizer adds, none of them twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.fast_tokenizers import encode_plainly

__all__ = ["decode_ids", "encode_texts", "encode_untemplated", "is_encodable", "mark_ids", "special_ids"]

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

    Raises:
        ConfigError: a text holds half of a surrogate pair.
    """
    texts = list(texts_B)
    for index, text in enumerate(texts):
        if not is_encodable(text):
            raise ConfigError(f"text {index} holds half of a surrogate pair, which is no character: {text[:80]!r}")
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
    """Token ids of a text that has all its special tokens, such as a rendered chat template.

    Raises:
        ConfigError: the text holds half of a surrogate pair.
    """
    if not is_encodable(text):
        raise ConfigError("the conversation holds half of a surrogate pair, which is no character")
    ids_T = encode_plainly(tokenizer, text)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if ids_T is None else ids_T


def is_encodable(text: str) -> bool:
    r"""Whether UTF-8 can encode a text: it has no half of a surrogate pair, as JSON with broken escapes may.

    Examples:
        >>> is_encodable("text"), is_encodable("\ud83d")
        (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of all special tokens: those with a role (BOS, EOS...) and those added as special tokens."""
    marked = [index for index, token in _added_tokens(tokenizer).items() if getattr(token, "special", False)]
    return frozenset(map(int, [*tokenizer.all_special_ids, *marked]))


def mark_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that mark places in a conversation: the special ones, and other added ones but white space.

    Many fine-tuned models have end-of-turn tokens that are not marked as special; Gemma's line breaks are added tokens.
    """
    added = [index for index, token in _added_tokens(tokenizer).items() if str(token).strip()]
    return special_ids(tokenizer) | frozenset(map(int, added))


def _added_tokens(tokenizer: Any) -> Mapping[int, Any]:
    """The tokens that were added to the tokenizer's model, by their ids; empty where a tokenizer doesn't tell."""
    try:
        return getattr(tokenizer, "added_tokens_decoder", None) or {}
    except NotImplementedError:  # mistral-common's tokenizers
        return {}


def decode_ids(tokenizer: Any, ids_B_T: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
    """Texts of token ids. An id that the tokenizer has no token for, which a padded vocabulary allows, is no text."""
    rows = [list(ids_T) for ids_T in ids_B_T]
    if not rows:  # batch_decode([]) is one empty text
        return []
    try:
        return list(tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens))
    except (ValueError, TypeError, KeyError, IndexError):  # slow tokenizers; the fast ones leave such ids out
        rows = [[token for token in ids_T if token < len(tokenizer)] for ids_T in rows]
        return list(tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens))


def _added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after every text."""
    whole = list(tokenizer(_PROBE)["input_ids"])
    bare = encode_untemplated(tokenizer, _PROBE)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
