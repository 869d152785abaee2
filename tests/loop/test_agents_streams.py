"""Streams of agents through the gateway on a real server while its weights are updated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from tests.loop.sync_cases import load
from torchrl_sglang import AgentGateway, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server import SGLangServer

ATOL = 1e-4
NUM_TOKENS = 300
EARLY = 25
"""Tokens that the agent has read when the update begins."""
ASKED: dict[str, Any] = {"model": "m", "stream": True, "extra_body": {"ignore_eos": True}}


class Read:
    """What a client reads of a stream: the text, and every token with its log-prob where they are sent."""

    def __init__(self) -> None:
        self.text, self.tokens = "", []  # type: ignore[var-annotated]
        self.usage: Any = None

    def chat(self, client: openai.OpenAI, messages: list[Any], middle: Callable[[], None]) -> None:
        stream = client.chat.completions.create(
            messages=messages,
            max_tokens=NUM_TOKENS,
            logprobs=True,
            stream_options={"include_usage": True},
            **ASKED,
        )
        for chunk in stream:
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices:
                self.text += choice.delta.content or ""
                scores = choice.logprobs.content if choice.logprobs else None
                self.tokens += [(each.logprob, bytes(each.bytes or ())) for each in scores or ()]
            if len(self.tokens) >= EARLY:
                middle()

    def complete(self, client: openai.OpenAI, prompt: str, middle: Callable[[], None]) -> None:
        stream = client.completions.create(prompt=prompt, max_tokens=NUM_TOKENS, logprobs=0, **ASKED)
        for chunk in stream:
            for choice in chunk.choices:
                self.text += choice.text
                if choice.logprobs:
                    self.tokens += [(score, None) for score in choice.logprobs.token_logprobs or ()]
            if len(self.tokens) >= EARLY:
                middle()


def scores_of(model: Any, ids: tuple[int, ...]) -> list[float]:
    """The log-prob of every token but the first, given those before it."""
    ids_1T = torch.tensor([ids])
    with torch.no_grad():
        scores = model(ids_1T).logits[0, :-1].log_softmax(-1)
    return [0.0, *scores.gather(-1, ids_1T[0, 1:, None])[:, 0].tolist()]


@pytest.mark.parametrize(("path", "mode"), [("chat", "retract"), ("chat", "abort"), ("completions", "retract")])
def test_a_stream_goes_on_across_an_update_and_each_token_has_the_version_that_made_it(
    pristine_server: SGLangServer, tiny_llama: Path, tiny_llama_b: Path, mode: Any, path: str
) -> None:
    models = load(tiny_llama), load(tiny_llama_b)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    read, pushed = Read(), []
    with (
        closing(SGLangPool([SGLangClient(pristine_server.url)])) as pool,
        AgentGateway(pool) as gateway,
        closing(WeightSync(pool, SyncConfig(pause=mode, bucket_bytes=60_000))) as sync,
    ):
        sync.connect()  # takes longer than a turn

        def update() -> None:
            if not pushed:
                pushed.append(len(read.tokens))
                sync.push(models[1])

        session = gateway.create_session()
        with openai.OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as client:
            if path == "chat":
                read.chat(client, [{"role": "user", "content": "dog"}], update)
            else:
                read.complete(client, "The dog", update)
        (leaf,) = gateway.trajectories(session.id)

    sampled = [index for index, mask in enumerate(leaf.loss_mask) if mask]
    ids = [leaf.token_ids[index] for index in sampled]
    assert len(ids) == NUM_TOKENS
    # what the agent read: every token once, in its order
    assert [score for score, _ in read.tokens] == pytest.approx([leaf.log_probs[index] for index in sampled])
    assert read.text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if path == "chat":
        assert read.text == leaf.messages[-1]["content"]
        assert read.usage.completion_tokens == NUM_TOKENS
    # what is recorded: the version of each token is that of the model that it was drawn from
    versions = [leaf.weight_versions[index] for index in sampled]
    assert versions == sorted(versions)
    assert set(versions) == {0, 1}
    assert versions.count(0) >= pushed[0]
    both = [scores_of(model, leaf.token_ids) for model in models]
    for index, version in zip(sampled, versions, strict=True):
        assert leaf.log_probs[index] == pytest.approx(both[version][index], abs=ATOL)
    # and not of the other: the split is at the right token
    first_new = sampled[versions.index(1)]
    for index, other in ((first_new - 1, 1), (first_new, 0)):
        assert leaf.log_probs[index] != pytest.approx(both[other][index], abs=10 * ATOL)
