"""The policy in TorchRL's collectors, conversations with tools, losses and reference models."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torchrl.envs.transforms
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torch.utils.data import DataLoader
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.collectors.llm import LLMCollector
from torchrl.data import Composite, LazyStackStorage, ReplayBuffer, Unbounded
from torchrl.data.llm import History
from torchrl.envs import AsyncEnvPool, Transform, TransformedEnv
from torchrl.envs.llm import ChatEnv
from torchrl.envs.llm.transforms import IncrementalTokenizer, KLRewardTransform, RetrieveKL, RetrieveLogProb
from torchrl.modules.llm import ChatHistory, TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, SFTLoss
from transformers import AutoTokenizer

from tests.loop.rollout_cases import ANSWERED, reference_log_probs, rows
from torchrl_sglang import AsyncSGLang, SGLangWrapper
from torchrl_sglang.server import SGLangServer

pytestmark = pytest.mark.torchrl

QUESTIONS = ["What is 2 + 3?", "Hello world!", "dog", "The quick brown fox"]
TOOL_REPLY = "result 42"


class EndAfter(Transform):
    """Ends a conversation after so many answers, each worth 1."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.turns = turns

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        conversations = next_tensordict["history"].prompt.unbind(0)
        answers = torch.tensor([sum(role == "assistant" for role in c.role) for c in conversations])
        done = (answers >= self.turns).reshape(next_tensordict["done"].shape)
        next_tensordict["done"], next_tensordict["terminated"] = done, done.clone()
        next_tensordict["reward"] = torch.ones(*next_tensordict.shape, 1, 1)
        return next_tensordict

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1, 1))
        return reward_spec


class Tool(Transform):
    """Answers every turn of the assistant with a message of its own."""

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        reply = History(role="tool", content=TOOL_REPLY)
        conversations = next_tensordict["history"].prompt.unbind(0)
        next_tensordict["history"].prompt = lazy_stack([c.append(reply, inplace=False) for c in conversations])
        return next_tensordict


def make_env(folder: Path, turns: int = 1, batch: int = 2) -> TransformedEnv:
    questions = DataLoader([{"query": question} for question in QUESTIONS], batch_size=batch)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    env = ChatEnv.from_dataloader(questions, batch_size=(batch,), tokenizer=tokenizer, system_prompt="Be brief.")
    return env.append_transform(EndAfter(turns))


def make_policy(where: Any, **kwargs: Any) -> SGLangWrapper:
    return SGLangWrapper(where, **{"generate_kwargs": {"max_new_tokens": 6}, **kwargs})


def assert_sampled_from(model: Any, batch: TensorDictBase) -> int:
    """Every recorded log-prob is the model's; returns the number of sequences."""
    flat = batch.reshape(-1)
    for row in flat.unbind(0):
        full, prompt = row["tokens", "full"], row["tokens", "prompt"]
        written = row["masks", "all_assistant_mask"]
        assert int(written.sum()) == len(full) - len(prompt)
        expected = reference_log_probs(model, full)[len(prompt) :]
        torch.testing.assert_close(row["log_probs", "response"], expected, atol=1e-4, rtol=0)
    return len(flat)


# ----------------------------------------------------------------------------------------------------------- collectors


def test_a_collector_yields_the_models_tokens_and_log_probs(engine: AsyncSGLang, model: Any, tiny_llama: Path) -> None:
    collector = Collector(make_env(tiny_llama), make_policy(engine), frames_per_batch=4, total_frames=8)
    batches = list(collector)
    collector.shutdown()
    assert [batch.batch_size for batch in batches] == [(2, 2), (2, 2)]
    assert sum(assert_sampled_from(model, batch) for batch in batches) == 8


def test_an_llm_collector_yields_last_steps(engine: AsyncSGLang, model: Any, tiny_llama: Path) -> None:
    collector = LLMCollector(
        make_env(tiny_llama, turns=2),
        policy=make_policy(engine),
        dialog_turns_per_batch=2,
        total_dialog_turns=8,
        yield_only_last_steps=True,
    )
    batches = list(collector)
    collector.shutdown()
    for batch in batches:
        assert_sampled_from(model, batch)
        assert bool(batch["next", "done"].all())
        assert all(list(h.role).count("assistant") == 2 for h in batch["history"].full.unbind(0))


def test_an_llm_collector_yields_completed_trajectories(engine: AsyncSGLang, model: Any, tiny_llama: Path) -> None:
    policy = make_policy(engine, prefer_tokens=True)
    collector = LLMCollector(
        make_env(tiny_llama, turns=2),
        policy=policy,
        dialog_turns_per_batch=4,
        total_dialog_turns=8,
        yield_completed_trajectories=True,
    )
    assert policy.collector is collector
    for batch in collector:
        assert_sampled_from(model, batch)
        first, second = batch.unbind(0)[:2]
        shared = len(first["tokens", "full"])
        assert torch.equal(second["tokens", "prompt"][:shared], first["tokens", "full"])
    collector.shutdown()


def test_environments_in_threads_share_the_policy(engine: AsyncSGLang, model: Any, tiny_llama: Path) -> None:
    envs = [functools.partial(make_env, tiny_llama, 2, 1)] * 2
    collector = LLMCollector(
        AsyncEnvPool(envs, backend="threading", stack="lazy"),
        policy=make_policy(engine, batching=True),
        dialog_turns_per_batch=4,
        total_dialog_turns=8,
        yield_completed_trajectories=True,
    )
    assert sum(assert_sampled_from(model, batch) for batch in collector) == 8
    collector.shutdown()


def test_workers_of_a_multi_collector_get_working_copies(server: SGLangServer, model: Any, tiny_llama: Path) -> None:
    make = functools.partial(make_env, tiny_llama)
    # padded, and one step per worker: TorchRL can't stack workers' ragged batches
    collector = MultiSyncCollector(
        [make, make],
        make_policy(server.url, pad_output=True),
        frames_per_batch=4,
        total_frames=8,
        use_buffers=False,
        cat_results="stack",
    )
    batches = list(collector)
    collector.shutdown()
    assert [batch.batch_size for batch in batches] == [(2, 2, 1)] * 2
    for row in (row for batch in batches for row in batch.reshape(-1).unbind(0)):
        real = row["tokens", "full"][row["masks", "all_attention_mask"]]
        made = int(row["generation"].completion_tokens)
        expected = reference_log_probs(model, real)[-made:]
        torch.testing.assert_close(row["log_probs", "response"][:made], expected, atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize("incremental", [False, True], ids=["plain", "IncrementalTokenizer"])
def test_a_conversation_with_a_tool_keeps_its_tokens_turn_after_turn(
    engine: AsyncSGLang, tokenizer: Any, tiny_llama: Path, incremental: bool
) -> None:
    # IncrementalTokenizer reads tokens of a batch of one only; it knows nothing of the tool's messages
    env = make_env(tiny_llama, turns=4, batch=1 if incremental else 2).append_transform(Tool())
    if incremental:
        env.append_transform(IncrementalTokenizer(tokenizer))
    rollout = env.rollout(4, make_policy(engine, prefer_tokens=True))
    for conversation in rollout.unbind(0):
        before: list[int] = []
        for turn, step in enumerate(conversation.unbind(0)):
            prompt = step["tokens", "prompt"].tolist()
            assert prompt[: len(before)] == before
            added = tokenizer.decode(prompt[len(before) :])
            assert (TOOL_REPLY in added) == (turn > 0)
            assert added.endswith("<|im_start|>assistant\n")
            assert step["text"].prompt == tokenizer.decode(prompt)
            before = step["tokens", "full"].tolist()


def test_tokens_of_an_ended_episode_are_not_used_for_the_next(engine: AsyncSGLang, tokenizer: Any) -> None:
    policy = make_policy(engine, prefer_tokens=True)
    first, second = (
        TensorDict(history=ChatHistory(prompt=History.from_chats([[c]]), batch_size=[1]), batch_size=[1])
        for c in ({"role": "user", "content": "one"}, {"role": "user", "content": "two"})
    )
    policy(first)
    first["history"] = second["history"]
    assert "two" in tokenizer.decode(policy(first)["tokens", "prompt"][0])


def test_an_answer_that_ended_by_itself_does_not_end_twice_next_turn(engine: AsyncSGLang, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    policy = make_policy(engine, generate_kwargs={"max_new_tokens": 2, "logit_bias": {str(eos): 100.0}})
    out = policy(
        TensorDict(
            history=ChatHistory(prompt=History.from_chats([[{"role": "user", "content": "dog"}]]), batch_size=[1]),
            batch_size=[1],
        )
    )
    assert rows(out, "tokens", "response")[0].tolist() == [eos]
    assert out["text"].response[0] == tokenizer.eos_token
    assert out["history"].full[0].content[-1] == ""
    assert out["history"].full[0].is_complete[-1]
    rendered = out["history"].full[0].apply_chat_template(tokenizer=tokenizer, add_generation_prompt=False)
    assert rendered.startswith(out["text"].full[0])
    assert rendered.count(tokenizer.eos_token) == 2


# ----------------------------------------------------------------------------------------- losses and reference models


def test_the_first_update_of_grpo_has_a_ratio_of_one(
    engine: AsyncSGLang, model: Any, tokenizer: Any, tiny_llama: Path
) -> None:
    batch = make_env(tiny_llama, batch=4).rollout(1, make_policy(engine)).reshape(-1)
    batch["advantage"] = torch.tensor([1.0, -1.0, 2.0, -2.0]).reshape(4, 1, 1)
    actor = TransformersWrapper(model, tokenizer=tokenizer, generate=False, input_mode="tokens", pad_output=False)
    loss = GRPOLoss(actor)(batch.select("tokens", "masks", "log_probs", "advantage"))
    # the effective sample size is the number of sequences' tokens it was computed on when all ratios are one
    assert float(loss.clip_fraction) == 0
    assert abs(float(loss.kl_approx)) < 1e-6
    assert torch.isfinite(loss.loss_objective)


@pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])
def test_a_server_can_be_the_reference_model(engine: AsyncSGLang, model: Any, tokenizer: Any, pad_output: bool) -> None:
    def conversations() -> TensorDict:
        history = ChatHistory(full=History.from_chats(ANSWERED[::2]), batch_size=[2])
        return TensorDict(history=history, batch_size=[2])

    settings = {"generate": False, "pad_output": pad_output}
    ours, theirs = (
        RetrieveLogProb(reference, assistant_only=True, tokenizer=tokenizer)(conversations())
        for reference in (
            SGLangWrapper(engine, log_probs_key="ref_log_probs", **settings),
            TransformersWrapper(model, tokenizer=tokenizer, log_probs_key="ref_log_probs", **settings),
        )
    )
    for a, b in zip(rows(ours, "ref_log_probs", "full"), rows(theirs, "ref_log_probs", "full"), strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    penalty = RetrieveKL(
        gen_model=TransformersWrapper(model, tokenizer=tokenizer, log_probs_key="gen_log_probs", **settings),
        ref_model=SGLangWrapper(engine, log_probs_key="ref_log_probs", **settings),
        assistant_only=True,
        tokenizer=tokenizer,
        add_to_reward=False,
        gen_log_probs_full_key=("gen_log_probs", "full"),  # TorchRL can't rename ragged entries
    )(conversations())
    divergence = penalty.get("kl_penalty", as_list=True)
    for kl in divergence.unbind(0) if isinstance(divergence, torch.Tensor) else divergence:
        assert float(kl.detach().abs().max()) < 1e-4


def test_a_server_can_be_the_reference_of_a_kl_reward(engine: AsyncSGLang, tiny_llama: Path) -> None:
    env = make_env(tiny_llama, batch=1)
    env.append_transform(KLRewardTransform(SGLangWrapper(engine, generate=False, input_mode="tokens"), coef=1.0))
    batch = env.rollout(1, make_policy(engine)).reshape(-1)
    assert float(batch["next", "kl_penalty"].abs().max()) < 1e-4
    assert batch["next", "reward"].shape[-2] == batch["tokens", "full"].shape[-1]


def test_a_server_can_be_the_reference_of_sft(engine: AsyncSGLang, model: Any, tokenizer: Any) -> None:
    history = History.from_chats(ANSWERED[::2])
    data = TensorDict(history=ChatHistory(full=history), batch_size=[2], next=TensorDict(batch_size=[2]))
    reference = RetrieveLogProb(
        SGLangWrapper(engine, generate=False, log_probs_key="ref_log_probs"), assistant_only=True, tokenizer=tokenizer
    )
    data = reference(data)
    actor = TransformersWrapper(model, tokenizer=tokenizer, generate=False, log_probs_key="log_probs")
    loss = SFTLoss(actor_network=actor, tokenizer=tokenizer, normalize_by_seq_length=True, kl_to_ref_coeff=1.0)
    out = loss(data)
    assert torch.isfinite(out.loss_sft)
    assert abs(float(out.loss_kl_to_ref)) < 1e-4


@pytest.mark.skipif(not hasattr(torchrl.envs.transforms, "PolicyAgeFilter"), reason="came with torchrl 0.14")
def test_stale_data_is_filtered_by_the_weights_that_made_it(engine: AsyncSGLang, tiny_llama: Path) -> None:
    batch = make_env(tiny_llama).rollout(1, make_policy(engine)).reshape(-1)
    assert batch["generation"].policy_version.tolist() == [0, 0]
    live = {"version": 1}
    buffer = ReplayBuffer(
        storage=LazyStackStorage(8),
        transform=torchrl.envs.transforms.PolicyAgeFilter(
            lambda: live["version"], max_policy_lag=1, policy_version_key=("generation", "policy_version"), strict=True
        ),
    )
    buffer.extend(batch)
    assert len(buffer) == 2
    live["version"] = 2
    assert len(buffer.sample(2)) == 0
