"""Streams of agents through the gateway on a real server while its weights are updated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from tests.loop.sync_cases import load
from torchrl_sglang import AgentGateway, SyncConfig, WeightSync
from torchrl_sglang.agents.types import Trajectory
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server import SGLangServer

ATOL = 1e-4
NUM_TOKENS = 300
EARLY = 25
"""Tokens that the agent has read when the update begins."""
ASKED: dict[str, Any] = {
    "model": "m",
    "stream": True,
    "max_tokens": NUM_TOKENS,
    "extra_body": {"ignore_eos": True},
}
_MOST_TRIES = 6
"""An update that comes late finds the answer complete."""


class Read:
    """What a client reads of a stream: the text, and the log-prob of every token.

    ``middle`` is called after each piece from the token on that ``EARLY`` says.
    """

    def __init__(self) -> None:
        self.text = ""
        self.scores: list[float] = []

    def chat(self, client: openai.OpenAI, text: str, middle: Callable[[], Any], **asked: Any) -> None:
        messages: list[Any] = [{"role": "user", "content": text}]
        stream = client.chat.completions.create(messages=messages, logprobs=True, **ASKED, **asked)
        for chunk in stream:
            for choice in chunk.choices:
                self.text += choice.delta.content or ""
                scores = choice.logprobs.content if choice.logprobs else None
                self.scores += [each.logprob for each in scores or ()]
            if len(self.scores) >= EARLY:
                middle()

    def complete(self, client: openai.OpenAI, prompt: str, middle: Callable[[], Any]) -> None:
        for chunk in client.completions.create(prompt=prompt, logprobs=0, **ASKED):
            for choice in chunk.choices:
                self.text += choice.text
                self.scores += (choice.logprobs.token_logprobs if choice.logprobs else None) or ()
            if len(self.scores) >= EARLY:
                middle()


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """The text of tokens without special ones, which may stand between two halves of a character."""
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    for mark in tokenizer.all_special_tokens:
        text = text.replace(mark, "")
    return text


def scores_of(model: Any, ids: tuple[int, ...]) -> list[float]:
    """The log-prob of every token but the first, given those before it."""
    ids_1T = torch.tensor([ids])
    with torch.no_grad():
        scores = model(ids_1T).logits[0, :-1].log_softmax(-1)
    return [0.0, *scores.gather(-1, ids_1T[0, 1:, None])[:, 0].tolist()]


@pytest.mark.parametrize(
    ("path", "mode"),
    [("chat", "retract"), ("chat", "abort"), pytest.param("completions", "retract", marks=pytest.mark.slow)],
)
def test_a_stream_goes_on_across_an_update_and_each_token_has_the_version_that_made_it(
    pristine_server: SGLangServer, tiny_llama: Path, tiny_llama_b: Path, mode: Any, path: str
) -> None:
    models = load(tiny_llama), load(tiny_llama_b)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with (
        closing(SGLangPool([SGLangClient(pristine_server.url)])) as pool,
        AgentGateway(pool) as gateway,
        closing(WeightSync(pool, SyncConfig(pause=mode, bucket_bytes=60_000))) as sync,
    ):
        sync.connect()  # takes longer than a turn
        for old in range(_MOST_TRIES):
            waiting = [lambda new=models[(old + 1) % 2]: sync.push(new)]
            session, read = gateway.create_session(), Read()
            with openai.OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as client:
                ask = read.chat if path == "chat" else read.complete
                ask(client, "dog", lambda left=waiting: left.pop()() if left else None)
            (leaf,) = gateway.trajectories(session.id)
            versions = check_stream(read, leaf, tokenizer, {v: models[v % 2] for v in (old, old + 1)})
            assert versions <= {old, old + 1}
            if len(versions) == 2:
                return
    raise AssertionError("every update came when the answer was complete")


def check_stream(read: Read, leaf: Trajectory, tokenizer: Any, models: Mapping[int, Any]) -> set[int]:
    """Check a stream and its record: every token once, in its order, each of the model of its version.

    Returns:
        The versions.
    """
    sampled = [index for index, mask in enumerate(leaf.loss_mask) if mask]
    ids = [leaf.token_ids[index] for index in sampled]
    assert len(ids) == NUM_TOKENS
    assert read.scores == pytest.approx([leaf.log_probs[index] for index in sampled])
    assert read.text == text_of(tokenizer, ids) == leaf.messages[-1]["content"]
    versions = [leaf.weight_versions[index] for index in sampled]
    assert versions == sorted(versions)
    scores = {version: scores_of(model, leaf.token_ids) for version, model in models.items()}
    for index, version in zip(sampled, versions, strict=True):
        assert leaf.log_probs[index] == pytest.approx(scores[version][index], abs=ATOL)
    if len(set(versions)) == 2:  # at the split, no token agrees with the other model
        first_new = sampled[versions.index(versions[-1])]
        for index, other in ((first_new - 1, versions[-1]), (first_new, versions[0])):
            assert leaf.log_probs[index] != pytest.approx(scores[other][index], abs=10 * ATOL)
    return set(versions)


@pytest.mark.slow
def test_a_stop_string_across_an_update_ends_the_answer_where_it_would_have_ended(
    pristine_server: SGLangServer, tiny_llama: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = {token: tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))}
    words = {token: 1000.0 for token, text in texts.items() if text and text.isascii() and text.isprintable()}
    greedy = {"temperature": 0, "logit_bias": words}
    with (
        closing(SGLangPool([SGLangClient(pristine_server.url)])) as pool,
        AgentGateway(pool) as gateway,
        closing(WeightSync(pool, SyncConfig(pause="abort", bucket_bytes=60_000))) as sync,
    ):
        sync.connect()
        weights = load(tiny_llama)

        def answer(middle: Callable[[], None], **more: Any) -> tuple[str, list[int], Any]:
            """What the agent reads, and the sampled tokens, in a session of their own."""
            session, read = gateway.create_session(), Read()
            with openai.OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as client:
                read.chat(client, "dog", middle, **greedy, **more)
            (leaf,) = gateway.trajectories(session.id)
            return read.text, [t for t, mask in zip(leaf.token_ids, leaf.loss_mask, strict=True) if mask], leaf

        whole, ids, _ = answer(lambda: None)
        assert tokenizer.decode(ids) == whole
        lengths = [len(tokenizer.decode(ids[:count])) for count in range(len(ids) + 1)]
        stop = whole[lengths[EARLY - 10] : lengths[NUM_TOKENS - 20]]
        at = whole.find(stop)
        num_tokens = next(count for count, length in enumerate(lengths) if length >= at + len(stop))
        for _ in range(_MOST_TRIES):  # a late update changes nothing either
            waiting = [lambda: sync.push(weights)]
            read, sampled, leaf = answer(lambda left=waiting: left.pop()() if left else None, stop=[stop])
            assert (read, sampled, leaf.finish_reason) == (whole[:at], ids[:num_tokens], "stop")
            if len({version for version in leaf.weight_versions if version >= 0}) > 1:
                break
