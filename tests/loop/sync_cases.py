"""Helpers of the weight-sync tests: comparing servers with a model, and a small collector."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torch.utils.data import DataLoader
from torchrl.collectors import Collector
from torchrl.data import Composite, Unbounded
from torchrl.envs import Transform, TransformedEnv
from torchrl.envs.llm import ChatEnv
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.loop.rollout_cases import greedy, reference_log_probs
from torchrl_sglang import ClientConfig, RequestRejectedError, SamplingParams, SGLangWrapper
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_begin_update, build_end_update, build_update_bucket
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.version import version_number

PROMPTS = [[1, 72, 101, 108], [5, 260, 300, 41, 88, 19, 118], [77]]
NEW_TOKENS = 10
ATOL = 1e-4


def load(folder: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_serves(urls: str | Sequence[str], model: nn.Module, version: int, *, api_key: str | None = None) -> None:
    """Assert that each server generates the tokens and log-probs of ``model``, labelled with this version."""
    for url in [urls] if isinstance(urls, str) else urls:
        pool = SGLangPool([SGLangClient(url, ClientConfig(api_key=api_key))])
        replies = pool.generate(PROMPTS, SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True))
        for prompt, reply in zip(PROMPTS, replies, strict=True):
            tokens = greedy(model, prompt, NEW_TOKENS, min_new_tokens=NEW_TOKENS)
            assert reply.output_ids == tokens, f"{url} generates the tokens of another model"
            assert_log_probs(reply, prompt, model)
            assert version_number(reply.weight_version) == version
        pool.close()


def assert_log_probs(reply: GenerateReply, prompt: Sequence[int], model: nn.Module) -> None:
    gap = gaps(reply, prompt, model).max().item()
    assert gap < ATOL, f"log-probs differ from the model's by {gap:.2g}"


def gaps(reply: GenerateReply, prompt: Sequence[int], model: nn.Module) -> torch.Tensor:
    """Per response token, the distance between its log-prob and the one of ``model``."""
    scores = reference_log_probs(model, torch.tensor([*prompt, *reply.output_ids]))[len(prompt) :]
    assert reply.output_logprobs is not None
    return (scores - torch.tensor(reply.output_logprobs)).abs()


def group_names(client: SGLangClient) -> list[str]:
    """The weight groups of a server, read from its refusal of a group it does not have."""
    client.send(build_begin_update())
    request = build_update_bucket(names=[], dtypes=[], shapes=[], group="no-such-group")
    try:
        client.send(request)
    except RequestRejectedError as error:
        listed = error.detail.split(" not in ")[1].split("]")[0] + "]"
        return list(json.loads(listed.replace("'", '"')))
    finally:
        client.send(build_end_update())
    raise AssertionError("the server accepted a group that does not exist")


class OneResponse(Transform):
    """Ends every conversation after its first response."""

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        next_tensordict["done"] = torch.ones_like(next_tensordict["done"])
        next_tensordict["terminated"] = torch.ones_like(next_tensordict["done"])
        next_tensordict["reward"] = torch.ones(*next_tensordict.shape, 1, 1)
        return next_tensordict

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1, 1))
        return reward_spec


def make_collector(
    url: str,
    folder: Path,
    scheme: Any,
    kind: Callable[..., Collector] = Collector,
    *,
    questions: Sequence[str] = ("dog", "Hello world!"),
    total_frames: int = -1,
) -> Collector:
    """A collector whose batches hold one response to each question; ``scheme`` may be ``None``."""
    size = len(questions)
    loader = DataLoader([{"query": question} for question in questions], batch_size=size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    env: TransformedEnv = ChatEnv.from_dataloader(loader, batch_size=(size,), tokenizer=tokenizer)
    env = env.append_transform(OneResponse())
    policy = SGLangWrapper(url, input_mode="history", generate_kwargs={"max_new_tokens": 6, "do_sample": False})
    schemes = {} if scheme is None else {"weight_sync_schemes": {"policy": scheme}}
    return kind(env, policy, frames_per_batch=size, total_frames=total_frames, **schemes)
