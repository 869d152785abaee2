"""Inputs for every wrapper, and the results of Hugging Face on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text, Tokens

CHATS = [
    [{"role": "user", "content": "What is 2 + 3?"}],
    [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Hello world!"},
        {"role": "assistant", "content": "I am fine, thank you."},
        {"role": "user", "content": "The capital of France?"},
    ],
    [{"role": "user", "content": "dog"}],
]
# TransformersWrapper can't stack conversations with different numbers of messages.
EVEN_CHATS = [[{"role": "system", "content": "Be brief."}, chat[-1]] for chat in CHATS]
ANSWERED = [
    [*chat, {"role": "assistant", "content": answer}]
    for chat, answer in zip(CHATS, ("5", "Paris.", "It is lazy."), strict=True)
]
TEXTS = ["The quick brown fox", "a", "Answer with only the number. 2 + 3 ="]
IDS = [[31, 45, 99, 200], [77], [5, 260, 300, 41, 88, 19, 118]]


def make_input(mode: str, *, generate: bool, even: bool = False) -> TensorDictBase:
    """Three prompts (or full sequences) of uneven lengths, one of them a single token.

    ``even`` gives all conversations the same number of messages.
    """
    name = "prompt" if generate else "full"
    if mode == "history":
        history = History.from_chats((EVEN_CHATS if even else CHATS) if generate else ANSWERED)
        return TensorDict(history=ChatHistory(**{name: history}, batch_size=[3]), batch_size=[3])
    if mode == "text":
        return TensorDict(text=Text(**{name: TEXTS}, batch_size=[3]), batch_size=[3])
    return lazy_stack([TensorDict(tokens=Tokens(**{name: torch.tensor(ids)})) for ids in IDS])


def reference_log_probs(model: Any, ids_T: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-prob of every token but the first given those before it; that of the first is 0."""
    with torch.no_grad():
        logits = model(ids_T[None]).logits[0, :-1].float() / temperature
    scores = torch.log_softmax(logits, -1).gather(-1, ids_T[1:, None])[:, 0]
    return torch.cat([torch.zeros(1), scores])


def largest_gap(model: Any, samples: Iterable[Mapping[str, Any]]) -> float:
    """Between the log-probs that lines of ``samples.jsonl`` hold and the model's, one sequence at a time."""
    gaps = []
    for sample in samples:
        ids_T = torch.tensor(sample["prompt_ids"] + sample["response_ids"])
        ours_R = reference_log_probs(model, ids_T)[len(sample["prompt_ids"]) :]
        gaps.append((ours_R - torch.tensor(sample["log_probs"])).abs().max().item())
    return max(gaps)


def greedy(model: Any, ids_T: list[int], max_new_tokens: int, **kwargs: Any) -> list[int]:
    """Hugging Face's greedy decoding of one prompt."""
    prompt = torch.tensor([ids_T])
    with torch.no_grad():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
            **kwargs,
        )
    return out[0, len(ids_T) :].tolist()


def rows(td: TensorDictBase, *key: str) -> list[torch.Tensor]:
    """One tensor per sequence, whatever the batch shape."""
    value = td.reshape(-1).get(key, as_list=True)
    return list(value)
