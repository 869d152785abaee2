"""The policy and the weight sync on a real SGLang 0.5.20: no update session, another endpoint for the load."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from tests.loop.rollout_cases import rows
from tests.loop.sync_cases import ATOL, PROMPTS, assert_log_probs, assert_serves, gaps, load
from torchrl_sglang import ConfigError, SamplingParams, SGLangPool, SGLangWrapper, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.parallel import Task
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.version import version_number
from torchrl_sglang.server import SGLangServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]  # a start takes minutes on a busy machine


def test_rollouts_and_updates_on_0_5_20(
    launch_server: Callable[..., SGLangServer], old_sglang_env: dict[str, str], tiny_llama: Path, tiny_llama_b: Path
) -> None:
    """All checks in one test, because a server takes long to start."""
    url = launch_server(env=old_sglang_env).url
    pool = SGLangPool([SGLangClient(url)])
    pool.connect()
    assert pool.info.version == "0.5.20"
    models = (load(tiny_llama), load(tiny_llama_b))
    assert_serves(url, models[0], version=0)

    # Two updates. The server's checksums need CUDA, so verify="full" is refused.
    for version in (1, 2):
        with closing(WeightSync(pool, SyncConfig(bucket_bytes=60_000))) as sync:
            report = sync.push(models[version % 2])
        assert report is not None
        assert report.pause == "abort"
        assert_serves(url, models[version % 2], version)

    # Requests in flight are aborted and continued by the policy, and every token is labelled with its weight version.
    policy = SGLangWrapper(pool, input_mode="tokens", generate_kwargs={"max_new_tokens": 400, "ignore_eos": True})
    running = Task(
        lambda: policy(lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(p))) for p in PROMPTS])), name="g"
    )
    wait_until_running(pool)
    with closing(WeightSync(pool)) as sync:
        sync.push(models[1])
        assert running.wait(120)
        out = running.outcome().unwrap()
        answers, scores = rows(out, "tokens", "response"), rows(out, "log_probs", "response")
        for prompt, ids, log_probs, version in zip(
            PROMPTS, answers, scores, rows(out, "generation", "weight_version"), strict=True
        ):
            assert len(ids) == 400
            assert version.unique().tolist() == [2, 3]
            reply = GenerateReply(output_ids=ids.tolist(), output_logprobs=log_probs.tolist())
            for number, model in ((2, models[0]), (3, models[1])):
                assert gaps(reply, prompt, model)[version == number].max() < ATOL

        # A pause mode that would end this server is refused; in_place uses a cache salt instead of a flush.
        retract = SyncConfig(pause="retract")
        with closing(WeightSync(pool, retract)) as other, pytest.raises(ConfigError, match="pause='abort'"):
            other.push(models[0])
        assert_serves(url, models[1], version=3)
        with closing(WeightSync(pool, SyncConfig(pause="in_place"))) as other:
            other.push(models[0])
        (reply,) = pool.generate(PROMPTS[:1], SamplingParams(max_new_tokens=10, temperature=0, ignore_eos=True))
        assert_log_probs(reply, PROMPTS[0], models[0])
        assert version_number(reply.weight_version) == 4


def wait_until_running(pool: SGLangPool) -> None:
    """Wait until the long requests have some tokens: a request that was sent after them has received five."""
    started = False
    for piece in pool.stream([77], SamplingParams(max_new_tokens=10, ignore_eos=True)):
        if len(piece.output_ids) >= 5:
            started = True
    assert started
