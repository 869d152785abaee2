"""Prompts and sequences read from a TensorDict as token ids, without padding. Given ids are never tokenized again.

Shapes: ``B`` sequences, each of its own length ``T``; ``ids_B_T`` is a list of lists, ``ids_BT`` a dense tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torchrl.data.llm import History

from torchrl_sglang.chat_templates import ChatRenderer
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.rollout.incremental_tokens import RewrittenAnswer, continue_tokens
from torchrl_sglang.rollout.messages import history_messages, refuse_media
from torchrl_sglang.rollout.padding import find_padding, first_match, may_be_padded
from torchrl_sglang.text_tokens import decode_ids, encode_texts, is_encodable

__all__ = ["Prompts", "prefer_given_tokens", "read_history", "read_text", "read_tokens"]


@dataclass(slots=True, kw_only=True)
class Prompts:
    """Sequences to generate from or to score.

    Attributes:
        ids_B_T: token ids without padding.
        texts_B: the ids as text, in text and history mode.
        histories_B: the conversations, in history mode.
        messages_B: the same as a template reads them.
        renderer: the chat template that rendered them.
        assistant_B_T: which tokens the assistant wrote, where the chat template marks them.
        width: width of the tensor that held the ids, if it was dense.
        dropped_B: tokens cut off on the left, per sequence.
        problems: per batch index, why that sequence can't be read; its ids are empty.
    """

    ids_B_T: list[list[int]]
    texts_B: list[str] | None = None
    histories_B: list[History] | None = None
    messages_B: list[list[dict[str, Any]]] | None = None
    renderer: ChatRenderer | None = None
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
    padding: Callable[[], tuple[int | None, int | None, int | None]] | None = None,
    assistant_key: NestedKey | None = None,
) -> Prompts:
    """Read token ids: a padded tensor, a nested tensor, or a list, one per sequence.

    The first attention mask among ``mask_keys`` that has the ids' shape decides what is padding. Without one, ragged
    ids have no padding, and in a dense tensor that is not marked ``padded=False`` the padding token's id is padding at
    the ends of a row (see :func:`find_padding`); between other tokens it is a token.

    Args:
        td: a TensorDict with one batch dimension ``B``.
        key: where the ids are.
        mask_keys: where attention masks may be; the entries are bool or 0/1.
        padding: returns the ids of the padding, the end-of-sequence and the beginning-of-sequence token, each of which
            may be ``None``; only called when they are needed.
        assistant_key: where a mask of the tokens that the assistant wrote may be.

    Raises:
        ConfigError: nothing is at ``key``, or the values are not integers.

    Examples:
        >>> from tensordict import TensorDict
        >>> td = TensorDict({"ids": torch.tensor([[0, 0, 7], [0, 8, 9]])}, batch_size=2)
        >>> read_tokens(td, "ids", padding=lambda: (0, 2, 1)).ids_B_T
        [[7], [8, 9]]
    """
    value = _require_value(td, key, "tokens")
    dense = isinstance(value, torch.Tensor) and not value.is_nested
    ids_B_T, problems = _as_rows(value, key)
    width = value.shape[-1] if dense else None
    keep_B_T = first_match(td, mask_keys, ids_B_T)
    if keep_B_T is None and padding is not None and may_be_padded(td, key, dense):
        keep_B_T = find_padding(ids_B_T, *padding())
        for index, keep_T in enumerate(keep_B_T):
            if ids_B_T[index] and not any(keep_T):
                problems[index] = (
                    f"{key!r} holds nothing but the padding token {ids_B_T[index][0]}; if it is a real token here, "
                    "give an attention mask, or a list of id lists instead of a tensor"
                )
    assistant_B_T = first_match(td, () if assistant_key is None else (assistant_key,), ids_B_T)
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
        if isinstance(row, np.ndarray):
            row = row.tolist()
        if isinstance(row, torch.Tensor):
            no_ints = row.is_floating_point() or row.is_complex() or row.dtype == torch.bool
            bad = row.ndim != 1 or (no_ints and row.numel() > 0)  # torch.tensor([]) is float
            shown = f"a {row.dtype} tensor of shape {tuple(row.shape)}"
        else:
            bad = not isinstance(row, (list, tuple)) or not all(
                type(i) is int or isinstance(i, np.integer) for i in row
            )
            shown = f"{row!r:.80}"
        if bad:
            problems[index] = f"{key!r} holds {shown}; one dimension of integer token ids is needed"
        rows.append([] if bad else row.tolist() if isinstance(row, torch.Tensor) else list(map(int, row)))
    return rows, problems


def read_text(
    td: TensorDictBase, key: NestedKey, tokenizer: Any, tokenizer_kwargs: Mapping[str, Any], *, open_end: bool = False
) -> Prompts:
    """Read strings and tokenize them, one per sequence.

    Args:
        td: a TensorDict with one batch dimension ``B``.
        key: where the strings are.
        tokenizer: a Hugging Face tokenizer. Special tokens that a text has already are not added to it again.
        tokenizer_kwargs: its arguments.
        open_end: the model continues the texts, so the tokenizer's EOS is not added.

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
        elif not is_encodable(text):
            problems[index] = f"{key!r} holds half of a surrogate pair, which is no character: {text[:80]!r}"
    texts_B = ["" if index in problems else text for index, text in enumerate(value)]
    ids_B_T = encode_texts(tokenizer, texts_B, tokenizer_kwargs, open_end=open_end)
    return Prompts(ids_B_T=ids_B_T, texts_B=texts_B, problems=problems)


def read_history(
    td: TensorDictBase,
    key: NestedKey,
    renderer: ChatRenderer,
    *,
    add_generation_prompt: bool,
    assistant_mask: bool = False,
) -> Prompts:
    """Read conversations and render them with the chat template.

    Args:
        td: a TensorDict with one batch dimension ``B``.
        key: where the :class:`~torchrl.data.llm.History` is, with the messages along its last dimension.
        renderer: the chat template.
        add_generation_prompt: end with the template's start of an assistant message.
        assistant_mask: also find which tokens the assistant wrote. If this fails for one conversation, none has a mask,
            and a warning says why.

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
    histories_B = list(history.unbind(0))
    messages_B, texts_B = [history_messages(conversation) for conversation in histories_B], []
    for index, messages in enumerate(messages_B):
        try:
            refuse_media(messages)
            text = renderer.render(messages, add_generation_prompt=add_generation_prompt)
        except ConfigError as error:
            problems[index] = f"{key!r}: {error}"
        else:
            if not is_encodable(text):
                problems[index] = f"{key!r} holds half of a surrogate pair, which is no character"
        texts_B.append("" if index in problems else text)
    return Prompts(
        # The rendered text has all special tokens; a second BOS would make a different prompt.
        ids_B_T=encode_texts(renderer.tokenizer, texts_B, {"add_special_tokens": False}),
        texts_B=texts_B,
        histories_B=histories_B,
        messages_B=messages_B,
        renderer=renderer,
        assistant_B_T=_assistant_masks(renderer, messages_B, texts_B, problems) if assistant_mask else None,
        problems=problems,
    )


def _assistant_masks(
    renderer: ChatRenderer, messages_B: list[list[dict[str, Any]]], texts_B: list[str], problems: Mapping[int, str]
) -> list[list[bool]] | None:
    masks_B_T: list[list[bool]] = []
    for index, (messages, text) in enumerate(zip(messages_B, texts_B, strict=True)):
        mask_T = [] if index in problems else renderer.assistant_mask(messages, text)
        if mask_T is None:
            warnings.warn(
                f"all_assistant_mask is left out: in the conversation at batch index {index}, the chat template does "
                "not show which tokens the assistant wrote. A template with {% generation %} tags does, and so does "
                'input_mode="tokens" with the mask at ("masks", "all_assistant_mask")',
                stacklevel=2,
            )
            return None
        masks_B_T.append(mask_T)
    return masks_B_T


def prefer_given_tokens(prompts: Prompts, given: Sequence[Prompts], *, rewritten: bool = False) -> Prompts:
    """Replace the ids of conversations by given ids of an earlier turn, extended by the newly tokenized part.

    Of several given sequences that belong to a conversation, the longest is used. Given ids of another conversation,
    such as those of an episode that has ended, are ignored, and so are those with an answer that the chat template
    renders otherwise than it was generated: such a prompt is the template's, and a warning says so.

    Args:
        prompts: the conversations, from :func:`read_history`.
        given: ids of earlier turns, from :func:`read_tokens`; an empty entry means none.
        rewritten: also keep ids of answers that the template renders otherwise.
    """
    assert prompts.renderer is not None
    ids_B_T, texts_B = list(prompts.ids_B_T), list(prompts.texts_B or ())
    refused = None
    for index, messages in enumerate(prompts.messages_B or ()):
        if index in prompts.problems:
            continue
        for known_T in sorted((one.ids_B_T[index] for one in given), key=len, reverse=True):
            try:
                joined = known_T and continue_tokens(known_T, messages, prompts.renderer, rewritten=rewritten)
            except RewrittenAnswer:
                refused = index if refused is None else refused
                break
            if joined:
                ids_B_T[index] = joined
                texts_B[index] = decode_ids(prompts.renderer.tokenizer, [joined])[0]
                break
    if refused is not None:
        warnings.warn(
            f"prefer_tokens: the tokens of batch index {refused} are not kept, because the chat template renders an "
            "earlier answer otherwise than it was generated (without its thinking, for example). The prompt is what "
            "the template renders; prefer_tokens='always' keeps the generated tokens instead",
            stacklevel=2,
        )
    return replace(prompts, ids_B_T=ids_B_T, texts_B=texts_B)
