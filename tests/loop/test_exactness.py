"""Recorded log-probs are those of the sampled distribution, and the trainer can compute the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss
from transformers import AutoTokenizer

from tests.loop.rollout_cases import make_input, rows
from torchrl_sglang import AsyncSGLang, SGLangWrapper
from torchrl_sglang.rollout.log_probs import temper, trainer_log_probs

SAMPLING = {
    "plain": {},
    "cold": {"temperature": 0.7},
    "hot": {"temperature": 1.3},
    "greedy": {"temperature": 0.0},
    "frequency": {"frequency_penalty": 0.8, "temperature": 0.7},
    "presence": {"presence_penalty": -1.5},
    "repetition": {"repetition_penalty": 1.7, "temperature": 1.3},
    "all penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    "bias": {"logit_bias": {"50": 3.0, "60": -4.0}, "temperature": 0.7},
}
TRUNCATED = {
    "top_p": {"top_p": 0.6, "temperature": 0.7},
    "top_k": {"top_k": 5, "temperature": 1.3},
    "min_p": {"min_p": 0.1},
    "all": {"top_p": 0.8, "top_k": 20, "min_p": 0.05, "temperature": 1.3, "presence_penalty": 0.5},
}


def generated(engine: AsyncSGLang, sampling: dict[str, Any], **kwargs: Any) -> tuple[SGLangWrapper, TensorDictBase]:
    settings = {"max_new_tokens": 12, "ignore_eos": True, **sampling}
    policy = SGLangWrapper(engine, input_mode="tokens", generate_kwargs=settings, **kwargs)
    return policy, policy(make_input("tokens", generate=True))


@pytest.mark.parametrize("name", SAMPLING)
def test_log_probs_under_temperature_and_penalties_are_exact(engine: AsyncSGLang, model: Any, name: str) -> None:
    policy, out = generated(engine, SAMPLING[name])
    assert out["generation"].exact_log_probs.all()
    with torch.no_grad():
        expected = trainer_log_probs(model, out, policy.sampling_params)
    for recorded, said in zip(rows(out, "log_probs", "response"), expected, strict=True):
        torch.testing.assert_close(recorded, said, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TRUNCATED)
def test_truncated_sampling_warns_that_log_probs_are_those_before_truncation(
    engine: AsyncSGLang, model: Any, name: str
) -> None:
    with pytest.warns(UserWarning, match="exact_log_probs"):
        policy, out = generated(engine, TRUNCATED[name])
    assert not out["generation"].exact_log_probs.any()
    with torch.no_grad():
        expected = trainer_log_probs(model, out, policy.sampling_params)
    for recorded, said in zip(rows(out, "log_probs", "response"), expected, strict=True):
        torch.testing.assert_close(recorded, said, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
@pytest.mark.parametrize("name", TRUNCATED)
def test_exact_log_probs_are_those_of_the_truncated_distribution(
    engine: AsyncSGLang, model: Any, name: str, pad_output: bool
) -> None:
    kwargs = {"exact_log_probs": True, "pad_output": pad_output, "num_samples": 2}
    policy, out = generated(engine, TRUNCATED[name], **kwargs)
    assert out["generation"].exact_log_probs.all()
    for chosen, support, recorded in zip(
        rows(out, "tokens", "response"),
        rows(out, "generation", "support"),
        rows(out, "log_probs", "response"),
        strict=True,
    ):
        assert (support == chosen[:, None]).any(-1).all()
        assert (support >= 0).sum(-1).max() < 320  # something was cut
        assert (recorded <= 0).all()
    if pad_output:
        return
    with torch.no_grad():
        expected = trainer_log_probs(model, out, policy.sampling_params, generation_key="generation")
    for recorded, said in zip(rows(out, "log_probs", "response"), expected, strict=True):
        torch.testing.assert_close(recorded, said, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_the_first_importance_ratio_of_grpo_is_one_at_every_temperature(
    engine: AsyncSGLang, model: Any, tiny_llama: Path, temperature: float
) -> None:
    _, out = generated(engine, {"temperature": temperature})
    out["advantage"] = torch.tensor([1.0, -1.0, 2.0]).reshape(3, 1, 1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    actor = TransformersWrapper(model, tokenizer=tokenizer, generate=False, input_mode="tokens", pad_output=False)

    def first_update() -> TensorDictBase:
        return GRPOLoss(actor)(out.select("tokens", "masks", "log_probs", "advantage"))

    with temper(model, temperature):
        loss = first_update()
    assert abs(float(loss.kl_approx)) < 1e-4  # what log-probs may differ by in float32; 1e-6 is usual
    assert float(loss.clip_fraction) == 0
    if temperature != 1.0:  # without it the ratios are far from one, or this test could not fail
        assert float(first_update().ESS) < 0.9999
