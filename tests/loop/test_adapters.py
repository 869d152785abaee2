"""Adapters on a real server: one it was started with, named by a request, and those that a trainer sends.

Both kinds share a server, since each start costs the suite twenty seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import (
    ConfigError,
    SamplingParams,
    SGLangClient,
    SGLangPool,
    SGLangWeightSyncScheme,
    SyncConfig,
    WeightSync,
)
from torchrl_sglang.chat import SGLangChat
from torchrl_sglang.errors import RequestRejectedError, WeightCoverageError, WeightUpdateError
from torchrl_sglang.protocol.version import version_number
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.weights.update.verification import trainer_logprobs

TARGETS = ("q_proj", "v_proj")
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
PROMPT = [1, 72, 101, 108, 108, 111]


@pytest.fixture
def lora_url(flagged_server: SGLangServer) -> str:
    return flagged_server.url


@pytest.fixture
def lora_pool(lora_url: str) -> SGLangPool:
    return SGLangPool([SGLangClient(lora_url)])


def adapted(model_path: Path, seed: int) -> peft.PeftModel:
    """A PEFT model whose adapter does something: PEFT starts with B = 0."""
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS)))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


def greedy(model: Any, count: int, prompt: Sequence[int] = PROMPT, **settings: Any) -> list[int]:
    ids = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0, **settings
    )
    return list(ids[0, len(prompt) :].tolist())


def test_an_adapter_named_in_the_request_speaks_as_peft_says(
    lora_url: str, saved_adapter: Path, tiny_llama: Path
) -> None:
    chat = SGLangChat(lora_url, temperature=0, max_new_tokens=24)
    text = chat.tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    prompt = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    plain = greedy(base, 24, prompt)
    tuned = greedy(peft.PeftModel.from_pretrained(base, saved_adapter).eval(), 24, prompt)
    assert plain != tuned, "the adapter must matter for this test to show anything"

    assert list(chat.chat(QUESTION)[0].token_ids) == plain
    (response,) = chat.chat(QUESTION, adapter="kind")
    assert list(response.token_ids) == tuned
    assert "".join(chat.iter_chat(QUESTION, adapter="kind")) == response.text
    assert SGLangChat(chat.pool, temperature=0, max_new_tokens=24, adapter="kind").chat(QUESTION) == [response]
    with pytest.raises(RequestRejectedError, match="never been loaded"):
        chat.chat(QUESTION, adapter="stranger")


def test_only_the_adapter_goes_over_and_answers_are_those_of_the_adapted_model(
    lora_pool: SGLangPool, tiny_llama: Path
) -> None:
    sync = WeightSync(lora_pool, SyncConfig(transport="lora"))
    sampling = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
    for turn, seed in enumerate((1, 2, 3), start=1):
        model = adapted(tiny_llama, seed)
        report = sync.push(model)
        assert report is not None
        assert (report.transport, report.version) == ("lora", turn)
        assert report.num_bytes < 0.1 * sum(p.numel() * 4 for p in model.parameters())
        assert report.max_logprob_gap < 1e-4

        (reply,) = lora_pool.generate([PROMPT], sampling)
        assert reply.output_ids == greedy(model, 8, min_new_tokens=8)
        expected = trainer_logprobs(model, PROMPT + reply.output_ids)[len(PROMPT) - 1 :]
        assert (expected - torch.tensor(reply.output_logprobs, dtype=torch.float64)).abs().max() < 1e-4
        assert [(version_number(s.version), s.start, s.end) for s in reply.weight_spans] == [(turn, 0, 8)]
        *_, streamed = lora_pool.stream(PROMPT, sampling)
        assert streamed.output_ids == reply.output_ids
        assert streamed.weight_spans == reply.weight_spans
    sync.close()


def test_a_refused_adapter_leaves_requests_with_the_one_before(lora_pool: SGLangPool, tiny_llama: Path) -> None:
    sync = WeightSync(lora_pool, SyncConfig(transport="lora"))
    good = adapted(tiny_llama, 4)
    sync.push(good)
    before = lora_pool.state.weights.adapter

    spoiled = adapted(tiny_llama, 5)
    next(p for n, p in spoiled.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")
    with pytest.raises(WeightCoverageError, match=r"lora_A"):
        sync.push(spoiled)
    with pytest.raises(ConfigError, match="PEFT"):
        sync.push(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))

    assert lora_pool.state.weights.adapter == before
    (reply,) = lora_pool.generate([PROMPT], SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True))
    assert reply.output_ids == greedy(good, 4, min_new_tokens=4)
    sync.close()


def test_an_adapter_that_fails_verification_is_unloaded_and_its_number_is_not_used_again(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama, enable_lora=True)) as fake:  # its log-probs are no model's
        pool = SGLangPool([SGLangClient(fake.url)])
        sync = WeightSync(pool, SyncConfig(transport="lora"))
        for _ in range(2):
            with pytest.raises(WeightUpdateError, match="differs from the trainer"):
                sync.push(adapted(tiny_llama, 6))
            assert pool.state.weights.adapter is None
        assert pool.state.weights.highest_version == 2
        sync.close()


def test_workers_in_other_processes_would_not_know_the_adapter() -> None:
    scheme = SGLangWeightSyncScheme("http://127.0.0.1:9", config=SyncConfig(transport="lora"))
    scheme.init_on_sender(model_id="policy", context=None)
    with pytest.raises(ConfigError, match="go on with the base model"):
        scheme.init_on_sender(model_id="policy", context=None, ctx=None)


def test_a_server_without_lora_is_refused_by_name(pool: SGLangPool, tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="--enable-lora"):
        WeightSync(pool, SyncConfig(transport="lora")).push(adapted(tiny_llama, 1))
