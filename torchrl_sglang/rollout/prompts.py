"""What a TensorDict asks for, as token ids: padding removed, order kept, nothing decoded and encoded again.

Shapes: ``B`` sequences, each of its own length ``T``; ``ids_B_T`` is a list of lists, ``ids_BT`` a dense tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torchrl.data.llm import History

from torchrl_sglang.errors import ConfigError

__all__ = ["Prompts", "read_history", "read_text", "read_tokens"]


@dataclass(slots=True, kw_only=True)
class Prompts:
    """Sequences to generate from or to score.

    Attributes:
        ids_B_T: token ids without padding.
        texts_B: what the ids spell, in text and history mode.
        histories_B: the conversations, in history mode.
        assistant_B_T: which tokens the assistant wrote, where the chat template tells.
        width: the padded width the ids came in, if they were padded.
        dropped_B: tokens cut off on the left, per sequence.
    """

    ids_B_T: list[list[int]]
    texts_B: list[str] | None = None
    histories_B: list[History] | None = None
    assistant_B_T: list[list[bool]] | None = None
    width: int | None = None
    dropped_B: list[int] | None = None


def _require_value(td: TensorDictBase, key: NestedKey, mode: str) -> Any:
    value = td.get(key, None, as_list=True)
    if value is None:
        present = sorted(".".join(k) if isinstance(k, tuple) else k for k in td.keys(True))
        raise ConfigError(
            f"Expected '{key}' key for {mode} input mode, but found keys: {present}. "
            "Put the prompts there, or name their place with input_key."
        )
    return value


def read_tokens(
    td: TensorDictBase,
    key: NestedKey,
    *,
    mask_keys: Sequence[NestedKey] = (),
    padding: Callable[[], tuple[int, int | None]] | None = None,
) -> Prompts:
    """Read token ids: a padded tensor, a nested tensor, or a list, one per sequence.

    Padding goes by the first attention mask among ``mask_keys`` that has the ids' shape. Without one, ragged ids are
    taken as they are, and of a dense tensor that is not marked ``padded=False`` the padding value is removed:
    everywhere, or at the two ends only when the padding token is also EOS and so may be a real token.

    Args:
        td: a TensorDict with one batch dimension ``B``.
        key: where the ids are.
        mask_keys: where attention masks may be; the entries are bool or 0/1.
        padding: gives the ids of the padding and the end-of-sequence token; only called when they are needed.

    Raises:
        ConfigError: nothing is at ``key``, or what is there are not integers.

    Examples:
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"ids": torch.tensor([[0, 0, 7], [0, 8, 9]])}, batch_size=2)
        >>> read_tokens(td, "ids", padding=lambda: (0, 2)).ids_B_T
        [[7], [8, 9]]
    """
    value = _require_value(td, key, "tokens")
    dense = isinstance(value, torch.Tensor) and not value.is_nested
    rows_B = _as_rows(value, key)
    ids_B_T = [row.tolist() if isinstance(row, torch.Tensor) else list(row) for row in rows_B]
    width = value.shape[-1] if dense else None
    mask_B_T = _matching_mask(td, mask_keys, ids_B_T)
    if mask_B_T is not None:
        ids_B_T = [
            ids_T if all(mask_T) else [i for i, keep in zip(ids_T, mask_T, strict=True) if keep]
            for ids_T, mask_T in zip(ids_B_T, mask_B_T, strict=True)
        ]
    elif padding is not None and _may_be_padded(td, key, dense):
        padding_value, eos_id = padding()
        ids_B_T = [_strip(ids_T, padding_value, only_ends=padding_value == eos_id) for ids_T in ids_B_T]
    return Prompts(ids_B_T=ids_B_T, width=width)


def _as_rows(value: Any, key: NestedKey) -> list[Any]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ConfigError(f"tokens at {key!r} have dtype {value.dtype}; token ids must be integers")
        if value.ndim != 2:
            raise ConfigError(f"tokens at {key!r} have shape {tuple(value.shape)}; one row of ids each is needed")
        return list(value.unbind(0)) if value.is_nested else value.tolist()
    if hasattr(value, "tolist") and not isinstance(value, list):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"tokens at {key!r} are a {type(value).__name__}; a tensor or a list of id lists is needed")
    for index, row in enumerate(value):
        if isinstance(row, torch.Tensor):
            if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool or row.ndim != 1:
                raise ConfigError(
                    f"batch index {index} of {key!r} is a {row.dtype} tensor of shape {tuple(row.shape)}; "
                    "one dimension of integer token ids is needed"
                )
        elif not isinstance(row, (list, tuple)) or not all(type(i) is int for i in row):
            raise ConfigError(f"batch index {index} of {key!r} is {row!r:.80}; a list of integer token ids is needed")
    return list(value)


def _matching_mask(
    td: TensorDictBase, mask_keys: Sequence[NestedKey], ids_B_T: list[list[int]]
) -> list[list[bool]] | None:
    for key in mask_keys:
        value = td.get(key, None, as_list=True)
        if value is None:
            continue
        if isinstance(value, torch.Tensor) and value.is_nested:
            value = list(value.unbind(0))
        mask_B_T = [[bool(m) for m in row.tolist()] for row in value]
        if [len(m) for m in mask_B_T] == [len(i) for i in ids_B_T]:
            return mask_B_T
    return None


def _may_be_padded(td: TensorDictBase, key: NestedKey, dense: bool) -> bool:
    marker = td.get((*key[:-1], "padded"), None) if isinstance(key, tuple) and len(key) > 1 else None
    if marker is not None:
        flags = marker.tolist() if hasattr(marker, "tolist") else marker
        flags = getattr(flags, "data", flags) if is_tensor_collection(flags) else flags
        return any(flags) if isinstance(flags, (list, tuple)) else bool(flags)
    return dense


def _strip(ids_T: list[int], padding_value: int, *, only_ends: bool) -> list[int]:
    if not only_ends:
        return [i for i in ids_T if i != padding_value]
    start, stop = 0, len(ids_T)
    while start < stop and ids_T[start] == padding_value:
        start += 1
    while stop > start and ids_T[stop - 1] == padding_value:
        stop -= 1
    return ids_T[start:stop]


def read_text(td: TensorDictBase, key: NestedKey, tokenizer: Any, tokenizer_kwargs: Mapping[str, Any]) -> Prompts:
    """Read strings and tokenize them, one per sequence.

    Raises:
        ConfigError: nothing is at ``key``, or what is there are not strings.
    """
    value = _require_value(td, key, "text")
    if is_tensor_collection(value):
        value = value.tolist()
    if isinstance(value, str):
        value = [value] * td.shape[0]
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise ConfigError(f"batch index {index} of {key!r} is a {type(text).__name__}; text mode needs strings")
    texts_B = list(value)
    encoded = tokenizer(texts_B, **tokenizer_kwargs)
    return Prompts(ids_B_T=[list(ids_T) for ids_T in encoded["input_ids"]], texts_B=texts_B)


def read_history(
    td: TensorDictBase,
    key: NestedKey,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    assistant_mask: bool = False,
) -> Prompts:
    """Read conversations and render them with the chat template.

    Args:
        td: a TensorDict with one batch dimension ``B``.
        key: where the :class:`~torchrl.data.llm.History` is, with the messages along its last dimension.
        tokenizer: a Hugging Face tokenizer.
        template_kwargs: ``chat_template`` or ``chat_template_name``, when not the tokenizer's own.
        add_generation_prompt: end with what makes the assistant answer.
        assistant_mask: also find which tokens the assistant wrote.

    Raises:
        ConfigError: nothing is at ``key``.
        TypeError: what is there is not a ``History``.
    """
    history = td.get(key, None)
    if history is None:
        history = _require_value(td, key, "history")
    if not isinstance(history, History):
        raise TypeError(f"Expected History object for '{key}', got {type(history)}")
    if history.ndim == 1:
        raise ConfigError(
            f"the History at {key!r} has shape {tuple(history.shape)}; its last dimension must be the messages of one "
            f"conversation, so (B, messages) is needed"
        )
    histories_B = list(history.unbind(0))
    texts_B = [
        h.apply_chat_template(tokenizer=tokenizer, add_generation_prompt=add_generation_prompt, **template_kwargs)
        for h in histories_B
    ]
    if not assistant_mask:
        # The template has put every special token into the text; adding BOS once more would be a different prompt.
        encoded = tokenizer(texts_B, add_special_tokens=False)
        return Prompts(ids_B_T=[list(i) for i in encoded["input_ids"]], texts_B=texts_B, histories_B=histories_B)
    structs_B = [
        h.apply_chat_template(
            tokenizer=tokenizer,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            padding=False,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **template_kwargs,
        )
        for h in histories_B
    ]
    masks_B = [s.get("assistant_masks", None) for s in structs_B]
    return Prompts(
        ids_B_T=[s.get("input_ids").tolist() for s in structs_B],
        texts_B=texts_B,
        histories_B=histories_B,
        assistant_B_T=None if any(m is None for m in masks_B) else [m.bool().tolist() for m in masks_B],
    )
