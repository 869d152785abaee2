"""The Rust tokenizer behind a fast tokenizer, for texts that need none of the options of transformers' call.

A call of transformers' prepares padding, truncation, offsets and tensors, and a decoding looks at each id. For the
short texts of an agent's turn this takes about as long as the work itself.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

__all__ = ["decode_plainly", "encode_plainly"]

_ENCODING = ("__call__", "_call_one", "encode_plus", "batch_encode_plus", "_encode_plus", "_batch_encode_plus")
_DECODING = ("decode", "_decode", "convert_tokens_to_string")


def encode_plainly(tokenizer: Any, text: str) -> list[int] | None:
    """What ``tokenizer(text, add_special_tokens=False)`` has as ``input_ids``; ``None`` if only that call can tell."""
    if not _is_plain(type(tokenizer), _ENCODING):
        return None
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:
        return None
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        return None
    encode = getattr(backend, "encode_batch_fast", backend.encode_batch)  # the fast one leaves offsets out
    return list(encode([text], add_special_tokens=False)[0].ids)


def decode_plainly(tokenizer: Any, ids_T: Sequence[int]) -> str | None:
    """The text of token ids, special tokens included and not cleaned up; ``None`` if only the tokenizer can tell."""
    if not _is_plain(type(tokenizer), _DECODING):
        return None
    return str(tokenizer.backend_tokenizer.decode(list(ids_T), skip_special_tokens=False))


@cache
def _is_plain(kind: Hashable, methods: tuple[str, ...]) -> bool:
    """Whether a class is a fast tokenizer that leaves these methods as transformers has them."""
    transformers = sys.modules.get("transformers")
    base = getattr(transformers, "PreTrainedTokenizerFast", None)
    if not isinstance(kind, type) or not isinstance(base, type) or not issubclass(kind, base):
        return False
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in methods)
