"""Scores of a served reward model equal those of transformers, as a list and as a TorchRL reward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.envs import TransformedEnv
from torchrl.envs.llm import ChatEnv

from torchrl_sglang.chat import SGLangChat
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.scores import RewardModel, RewardModelTransform
from torchrl_sglang.server import SGLangServer

TEXTS = ["Hello world!", "What is 2 + 3? 2 + 3 = 5.", "x", "The quick brown fox jumps over the lazy dog. " * 8]


@pytest.fixture(scope="module")
def classifier(make_model: Callable[..., Path]) -> Path:
    return make_model(arch="llama_classifier", seed=3)


@pytest.fixture
def rewards(special_server: Callable[..., SGLangServer], classifier: Path) -> RewardModel:
    return RewardModel(special_server(model=str(classifier), extra_args=("--is-embedding",)).url)


def true_scores(classifier: Path, texts: list[str], **tokenizing: Any) -> list[float]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt", **tokenizing)).logits.item() for text in texts]


def test_scores_are_the_logits_of_transformers(rewards: RewardModel, classifier: Path) -> None:
    expected = true_scores(classifier, TEXTS)
    assert max(expected) - min(expected) > 0.5
    assert rewards.get_scores(TEXTS) == pytest.approx(expected, abs=1e-4)
    assert rewards.get_scores(TEXTS[::-1]) == pytest.approx(expected[::-1], abs=1e-4)
    assert rewards.get_scores([]) == []
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    rendered = rewards.tokenizer.apply_chat_template(talk, tokenize=False)
    assert rewards.get_scores([talk]) == pytest.approx(
        true_scores(classifier, [rendered], add_special_tokens=False), abs=1e-4
    )


def test_texts_that_can_not_be_scored_are_refused(rewards: RewardModel, server: SGLangServer) -> None:
    with pytest.raises(ConfigError, match="must be a list"):
        rewards.get_scores("one text")
    with pytest.raises(ConfigError, match="text 1 must be a string"):
        rewards.get_scores(["a", 5])
    with pytest.raises(ConfigError, match="prompt 1 has .* tokens"):
        rewards.get_scores(["a", "word " * 5000])
    with pytest.raises(ConfigError, match="label=2, but the reward model has 1"):
        RewardModel(rewards.clients[0].url, label=2).get_scores(["a"])
    with pytest.raises(ConfigError, match="--is-embedding"):
        RewardModel(server.url)
    with pytest.raises(ConfigError, match="does not generate text"):
        SGLangChat(rewards.clients[0].url)


@pytest.mark.parametrize("mode", ["history", "text"])
def test_a_chat_env_gets_the_score_as_its_reward(rewards: RewardModel, classifier: Path, mode: str) -> None:
    env = ChatEnv(batch_size=(2,), input_mode=mode, tokenizer=rewards.tokenizer, system_prompt="Be brief.")
    env = TransformedEnv(env, RewardModelTransform(rewards))
    assert env.reward_spec.shape == (2, 1, 1)
    state = env.reset(TensorDict({"query": ["2 + 2?", "Hello?"]}, batch_size=(2,)))
    if mode == "history":
        prompt = state["history"].prompt
        answers = History(role=["assistant", "assistant"], content=["4", "Hi!"], batch_size=(2,)).unsqueeze(-1)
        state["history"].response = answers
        state["history"].full = prompt.extend(answers, dim=-1, inplace=False)
        expected_texts = [
            rewards.tokenizer.apply_chat_template(
                [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ],
                tokenize=False,
            )
            for question, answer in (("2 + 2?", "4"), ("Hello?", "Hi!"))
        ]
        expected = true_scores(classifier, expected_texts, add_special_tokens=False)
    else:
        texts = [f"{prompt}{answer}" for prompt, answer in zip(state["text"].prompt, ("4", "Hi!"), strict=True)]
        state["text"].response, state["text"].full = ["4", "Hi!"], texts
        expected = true_scores(classifier, texts)
    stepped = env.step(state)
    reward = stepped["next", "reward"]
    assert reward.shape == (2, 1, 1)
    assert reward.dtype == torch.float32
    assert reward.flatten().tolist() == pytest.approx(expected, abs=1e-4)


def test_a_step_without_text_is_refused(rewards: RewardModel) -> None:
    empty = TensorDict({"other": torch.zeros(2)}, batch_size=(2,))
    with pytest.raises(ConfigError, match="nothing to score"):
        RewardModelTransform(rewards)._step(empty, empty.clone())
