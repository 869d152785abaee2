"""What a request means does not depend on the flags that its server was launched with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from torchrl_sglang import (
    ConfigError,
    SamplingParams,
    ServerError,
    SGLangChat,
    SGLangPool,
    SGLangWrapper,
    trainer_log_probs,
)
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.testing import make_tiny_model

PROMPTS = [[1, 72, 101, 108], [5, 6, 7]]


@pytest.fixture
def flagged(flagged_server: SGLangServer) -> SGLangPool:
    """A server that streams increments and prefers other sampling parameters."""
    return SGLangPool([SGLangClient(flagged_server.url)])


def batch(key: str = "prompt") -> Any:
    return lazy_stack([TensorDict(tokens=Tokens(**{key: torch.tensor(prompt)})) for prompt in PROMPTS])


@pytest.mark.parametrize("given", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 50}], ids=str)
def test_log_probs_are_those_of_the_policys_own_settings(
    flagged: SGLangPool, model: Any, tokenizer: Any, given: dict
) -> None:
    policy = SGLangWrapper(
        flagged, input_mode="tokens", tokenizer=tokenizer, generate_kwargs={"max_new_tokens": 24, **given}
    )
    out = policy(batch())
    expected = trainer_log_probs(model, out, policy.sampling_params)
    for row, scores in zip(out.get(("log_probs", "response"), as_list=True), expected, strict=True):
        torch.testing.assert_close(row, scores, atol=1e-4, rtol=0)
    generation = out["generation"]
    assert generation.temperature.tolist() == pytest.approx([given.get("temperature", 1.0)] * 2)
    assert generation.top_k.tolist() == [given.get("top_k", -1)] * 2


def test_greedy_tokens_are_those_of_the_model_alone(flagged: SGLangPool, model: Any) -> None:
    params = SamplingParams(max_new_tokens=16, temperature=0, ignore_eos=True)
    replies = flagged.generate(PROMPTS, params)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        full = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(16):
                full = torch.cat([full, model(full).logits[:, -1].argmax(-1, keepdim=True)], dim=-1)
        assert reply.output_ids == full[0, len(prompt) :].tolist()


def test_streams_of_increments_lose_nothing(flagged: SGLangPool, tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
    whole = flagged.generate(PROMPTS, params, prompt_logprobs=True)
    shown = flagged.generate(PROMPTS, params, prompt_logprobs=True, progress=lambda tokens: None)
    for expected, reply in zip(whole, shown, strict=True):
        assert reply.output_ids == expected.output_ids
        assert reply.output_logprobs == pytest.approx(expected.output_logprobs, abs=1e-5)
        assert reply.prompt_logprobs[1:] == pytest.approx(expected.prompt_logprobs[1:], abs=1e-5)
        assert reply.text == expected.text
    chat = SGLangChat(flagged, tokenizer, temperature=0, max_new_tokens=20, ignore_eos=True)
    finished: list[Any] = []
    pieces = list(chat.iter_chat("What is 2 + 2?", return_log_probs=True, on_finish=finished.append))
    answer = chat.chat("What is 2 + 2?", return_log_probs=True)[0]
    assert len(pieces) > 2
    assert "".join(pieces) == finished[0].text == answer.text
    assert finished[0].token_ids == answer.token_ids
    assert finished[0].log_probs == pytest.approx(answer.log_probs, abs=1e-5)


def test_a_stop_id_outside_the_vocabulary_is_refused_and_the_server_lives(pool: SGLangPool) -> None:
    for settings in ({"stop_token_ids": [10**7]}, {"eos_token_id": 10**7}, {"eos_token_id": [2, 320]}):
        with pytest.raises(ConfigError, match="stop_token_ids holds"):
            pool.generate(PROMPTS, SamplingParams.from_kwargs(min_new_tokens=4, **settings))
    assert len(pool.generate(PROMPTS, SamplingParams(max_new_tokens=4, min_new_tokens=4, stop_token_ids=[319]))) == 2


@pytest.mark.slow
def test_min_new_tokens_is_refused_where_the_models_own_end_token_would_end_the_server(
    launch_server: Callable[..., SGLangServer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", arch="llama", seed=0)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, 5000]}))
    pool = SGLangPool([SGLangClient(launch_server(model=str(folder)).url)])
    with pytest.raises(ConfigError, match="min_new_tokens .* generation_config.json .* 5000.*320 ids"):
        pool.generate(PROMPTS, SamplingParams(max_new_tokens=4, min_new_tokens=2))
    assert len(pool.generate(PROMPTS, SamplingParams(max_new_tokens=4))) == 2


@pytest.mark.slow  # a server of its own
def test_weights_with_nan_give_an_error_instead_of_certainty(
    launch_server: Callable[..., SGLangServer], tmp_path_factory: pytest.TempPathFactory, tokenizer: Any
) -> None:
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", arch="llama", seed=0)
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    servers = launch_server(model=str(folder)).url
    for on_error in ("raise", "mask"):
        scoring = SGLangWrapper(servers, input_mode="tokens", tokenizer=tokenizer, generate=False, on_error=on_error)
        with pytest.raises(ServerError, match="no finite log-prob for token 1 of the prompt"):
            scoring(batch("full"))
