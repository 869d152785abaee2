"""Prompts and sequences read from a TensorDict as token ids, without padding. Given ids are never tokenized again.

Shapes: ``B`` sequences, each of its own length ``T``; ``ids_B_T`` is a list of lists, ``ids_BT`` a dense tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import torch
from jinja2 import TemplateError
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torchrl.data.llm import History

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.rollout.incremental_tokens import continue_tokens

__all__ = ["Prompts", "prefer_given_tokens", "read_history", "read_text", "read_tokens"]


@dataclass(slots=True, kw_only=True)
class Prompts:
    """Sequences to generate from or to score.

    Attributes:
        ids_B_T: token ids without padding.
        texts_B: the ids as text, in text and history mode.
        histories_B: the conversations, in history mode.
        assistant_B_T: which tokens the assistant wrote, where the chat template marks them.
        width: width of the tensor that held the ids, if it was dense.
        dropped_B: tokens cut off on the left, per sequence.
        problems: per batch index, why that sequence can't be read; its ids are empty.
    """

    ids_B_T: list[list[int]]
    texts_B: list[str] | None = None
    histories_B: list[History] | None = None
    assistant_B_T: list[list[bool]] | None = None
    width: int | None = None
    dropped_B: list[int] | None = None
    problems: dict[int, str] = field(default_factory=dict)


def _require_value(td: TensorDictBase, key: NestedKey, mode: str) -> Any:
    value = td.get(key, None, as_list=True)
    if value is None:
        present = sorted(".".join(k) if isinstance(k, tuple) else k for k in td.keys(True))
        raise ConfigError(
            f"Expected '{key}' key for {mode} input mode, but found keys: {present}. "
            "Put the prompts there, or set input_key to where they are."
        )
    return value


def read_tokens(
    td: TensorDictBase,
    key: NestedKey,
    *,
    mask_keys: Sequence[NestedKey] = (),
    padding: Callable[[], tuple[int, int | None]] | None = None,
    assistant_key: NestedKey | None = None,
) -> Prompts:
    """Read token ids: a padded tensor, a nested tensor, or a list, one per sequence.

    The first attention mask among ``mask_keys`` that has the ids' shape decides what is padding. Without one, ragged
    ids have no padding, and the padding value is removed from a dense tensor that is not marked ``padded=False``:
    everywhere, or at the two ends only when the padding token is also EOS, which may be a real token.

    Args:
        td: a TensorDict with one batch dimension ``B``.
        key: where the ids are.
        mask_keys: where attention masks may be; the entries are bool or 0/1.
        padding: returns the ids of the padding and the end-of-sequence token; only called when they are needed.
        assistant_key: where a mask of the tokens that the assistant wrote may be.

    Raises:
        ConfigError: nothing is at ``key``, or the values are not integers.

    Examples:
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"ids": torch.tensor([[0, 0, 7], [0, 8, 9]])}, batch_size=2)
        >>> read_tokens(td, "ids", padding=lambda: (0, 2)).ids_B_T
        [[7], [8, 9]]
    """
    value = _require_value(td, key, "tokens")
    dense = isinstance(value, torch.Tensor) and not value.is_nested
    ids_B_T, problems = _as_rows(value, key)
    width = value.shape[-1] if dense else None
    keep_B_T = _first_match(td, mask_keys, ids_B_T)
    if keep_B_T is None and padding is not None and _may_be_padded(td, key, dense):
        padding_value, eos_id = padding()
        keep_B_T = [_real(ids_T, padding_value, only_ends=padding_value == eos_id) for ids_T in ids_B_T]
    assistant_B_T = _first_match(td, () if assistant_key is None else (assistant_key,), ids_B_T)
    if keep_B_T is not None:
        ids_B_T = [list(compress(ids_T, keep_T)) for ids_T, keep_T in zip(ids_B_T, keep_B_T, strict=True)]
        if assistant_B_T is not None:
            assistant_B_T = [list(compress(mask_T, k)) for mask_T, k in zip(assistant_B_T, keep_B_T, strict=True)]
    return Prompts(ids_B_T=ids_B_T, assistant_B_T=assistant_B_T, width=width, problems=problems)


def _as_rows(value: Any, key: NestedKey) -> tuple[list[list[int]], dict[int, str]]:
    """Ids per sequence, and per batch index the reason why a sequence has none."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ConfigError(f"tokens at {key!r} have dtype {value.dtype}; token ids must be integers")
        if value.ndim != 2:
            raise ConfigError(f"tokens at {key!r} have shape {tuple(value.shape)}; (B, T) is needed")
        return [row.tolist() for row in value.unbind(0)] if value.is_nested else value.tolist(), {}
    if hasattr(value, "tolist") and not isinstance(value, list):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"tokens at {key!r} are a {type(value).__name__}; a tensor or a list of id lists is needed")
    rows: list[list[int]] = []
    problems: dict[int, str] = {}
    for index, row in enumerate(value):
        if isinstance(row, torch.Tensor):
            no_ints = row.is_floating_point() or row.is_complex() or row.dtype == torch.bool
            bad = row.ndim != 1 or (no_ints and row.numel() > 0)  # torch.tensor([]) is float
            shown = f"a {row.dtype} tensor of shape {tuple(row.shape)}"
        else:
            bad = not isinstance(row, (list, tuple)) or not all(type(i) is int for i in row)
            shown = f"{row!r:.80}"
        if bad:
            problems[index] = f"{key!r} holds {shown}; one dimension of integer token ids is needed"
        rows.append([] if bad else row.tolist() if isinstance(row, torch.Tensor) else list(row))
    return rows, problems


def _first_match(td: TensorDictBase, keys: Sequence[NestedKey], ids_B_T: list[list[int]]) -> list[list[bool]] | None:
    """The first mask among ``keys`` whose rows have the lengths of the ids."""
    for key in keys:
        value = td.get(key, None, as_list=True)
        if value is None:
            continue
        mask_B_T = (
            [row.bool().tolist() for row in value.unbind(0)]
            if isinstance(value, torch.Tensor)
            else [torch.as_tensor(row).bool().tolist() for row in value]
        )
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


def _real(ids_T: list[int], padding_value: int, *, only_ends: bool) -> list[bool]:
    """Which ids are not padding."""
    real = [i != padding_value for i in ids_T]
    if only_ends and True in real:
        first, last = real.index(True), len(real) - 1 - real[::-1].index(True)
        real[first : last + 1] = [True] * (last + 1 - first)
    return real


def read_text(td: TensorDictBase, key: NestedKey, tokenizer: Any, tokenizer_kwargs: Mapping[str, Any]) -> Prompts:
    """Read strings and tokenize them, one per sequence.

    Raises:
        ConfigError: nothing is at ``key``, or the values are not strings.
    """
    value = _require_value(td, key, "text")
    if is_tensor_collection(value):
        value = value.tolist()
    if isinstance(value, str):
        value = [value] * td.shape[0]
    problems: dict[int, str] = {}
    for index, text in enumerate(value):
        if not isinstance(text, str):
            problems[index] = f"{key!r} holds a {type(text).__name__}; text mode needs strings"
    texts_B = ["" if index in problems else text for index, text in enumerate(value)]
    encoded = tokenizer(texts_B, **tokenizer_kwargs)
    return Prompts(ids_B_T=[list(ids_T) for ids_T in encoded["input_ids"]], texts_B=texts_B, problems=problems)


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
        add_generation_prompt: end with the template's start of an assistant message.
        assistant_mask: also compute which tokens the assistant wrote.

    Raises:
        ConfigError: nothing is at ``key``.
        TypeError: the value is not a ``History``.
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
    problems: dict[int, str] = {}
    histories_B, texts_B, structs_B = list(history.unbind(0)), [], []
    template_args = {"tokenizer": tokenizer, "add_generation_prompt": add_generation_prompt, **template_kwargs}
    for index, conversation in enumerate(histories_B):
        try:
            texts_B.append(conversation.apply_chat_template(**template_args))
            if assistant_mask:
                structs_B.append(
                    conversation.apply_chat_template(
                        **template_args, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
                    )
                )
        except TemplateError as error:
            problems[index] = f"the chat template refuses the conversation at {key!r}: {error}"
            texts_B.append("")
            structs_B.append({"input_ids": torch.empty(0, dtype=torch.long), "assistant_masks": torch.empty(0)})
    if not assistant_mask:
        # The rendered text has all special tokens; a second BOS would make a different prompt.
        encoded = tokenizer(texts_B, add_special_tokens=False)["input_ids"]
        ids_B_T, masks_B_T = [list(ids_T) for ids_T in encoded], None
    else:
        ids_B_T = [struct.get("input_ids").tolist() for struct in structs_B]
        masks = [struct.get("assistant_masks", None) for struct in structs_B]
        masks_B_T = None if any(m is None for m in masks) else [m.bool().tolist() for m in masks]
    return Prompts(
        ids_B_T=ids_B_T, texts_B=texts_B, histories_B=histories_B, assistant_B_T=masks_B_T, problems=problems
    )


def prefer_given_tokens(
    prompts: Prompts, given: Sequence[Prompts], tokenizer: Any, template_kwargs: Mapping[str, Any]
) -> Prompts:
    """Replace the ids of conversations by given ids of an earlier turn, extended by the newly tokenized part.

    Of several given sequences that belong to a conversation, the longest is used. Given ids of another conversation,
    such as those of an episode that has ended, are ignored.

    Args:
        prompts: the conversations, from :func:`read_history`.
        given: ids of earlier turns, from :func:`read_tokens`; an empty entry means none.
        tokenizer: a Hugging Face tokenizer.
        template_kwargs: as for :func:`read_history`.
    """

    def render(conversation: History) -> str:
        text: str = conversation.apply_chat_template(
            tokenizer=tokenizer, add_generation_prompt=False, **template_kwargs
        )
        return text

    ids_B_T = list(prompts.ids_B_T)
    for index, (text, conversation) in enumerate(zip(prompts.texts_B or (), prompts.histories_B or (), strict=True)):
        known = sorted((one.ids_B_T[index] for one in given), key=len, reverse=True)
        for known_T in known:
            joined = known_T and continue_tokens(known_T, text, tokenizer, history=conversation, render=render)
            if joined:
                ids_B_T[index] = joined
                break
    return replace(prompts, ids_B_T=ids_B_T, texts_B=tokenizer.batch_decode(ids_B_T, skip_special_tokens=False))
