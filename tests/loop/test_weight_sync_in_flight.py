"""Requests in flight across an update: each token belongs to the weights its label names, no prefix is stale.

A stream beside the requests under test tells when tokens are being made, so nothing here waits by the clock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm import Tokens

from tests.loop.rollout_cases import rows
from tests.loop.sync_cases import ATOL, assert_log_probs, assert_serves, gaps, load
from torchrl_sglang import SamplingParams, SGLangWrapper, SyncConfig, SyncReport, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.version import version_number
from torchrl_sglang.server import SGLangServer

IDS = [[1, 72, 101, 108], [1, 72, 101, 108, 5]]
LONG = SamplingParams(max_new_tokens=400, ignore_eos=True)
TOKENS_BEFORE = 20


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tiny_llama_b: Path) -> tuple[Any, Any]:
    """What the server starts with, and what it is updated to; version 0 and 1."""
    return load(tiny_llama), load(tiny_llama_b)


@pytest.fixture
def pool(pristine_server: SGLangServer) -> Iterator[SGLangPool]:
    with closing(SGLangPool([SGLangClient(pristine_server.url)])) as made:
        made.connect()
        yield made


def push_in_the_middle(
    pool: SGLangPool, generate: Callable[[], Any], model: Any, config: SyncConfig
) -> tuple[Any, SyncReport]:
    """Push while ``generate()`` is under way; what it returned, and the report."""
    gauge_moves = threading.Event()

    def gauge() -> None:
        made = 0
        for piece in pool.stream([77], SamplingParams(max_new_tokens=600, ignore_eos=True)):
            made = len(piece.output_ids)
            if made >= TOKENS_BEFORE:
                gauge_moves.set()

    with closing(WeightSync(pool, config)) as sync:
        sync.connect()  # takes longer than a response
        running = Task(generate, name="generate")
        beside = Task(gauge, name="gauge")
        assert gauge_moves.wait(60), "no tokens came"
        report = sync.push(model)
    assert report is not None
    assert running.wait(60)
    assert beside.wait(60)
    return running.outcome().unwrap(), report


def check_spans(reply: GenerateReply, prompt: list[int], models: tuple[Any, Any]) -> list[int]:
    """Every token's log-prob is that of the model its span names, and not the other's; how many tokens per version."""
    counts = [0, 0]
    by_model = [gaps(reply, prompt, model) for model in models]
    assert reply.weight_spans[0].start == 0
    assert reply.weight_spans[-1].end == len(reply.output_ids)
    for span in reply.weight_spans:
        version = version_number(span.version)
        counts[version] += span.end - span.start
        mine, others = (by_model[v][span.start : span.end] for v in (version, 1 - version))
        if span.end > span.start:
            assert mine.max() < ATOL, f"tokens {span.start}..{span.end} are not version {version}'s"
        if span.end - span.start > 5:
            assert others.mean() > 0.1, "the models are too much alike to tell"
    return counts


@pytest.mark.parametrize("mode", ["retract", "auto"])
def test_tokens_before_and_after_an_update_belong_to_the_weights_they_claim(
    pool: SGLangPool, models: tuple[Any, Any], mode: Any
) -> None:
    config = SyncConfig(pause=mode, bucket_bytes=60_000)
    replies, report = push_in_the_middle(pool, lambda: pool.generate(IDS, LONG), models[1], config)
    assert report.pause == "retract"
    for prompt, reply in zip(IDS, replies, strict=True):
        before, after = check_spans(reply, prompt, models)
        assert before > 0
        assert after > 0
        assert len(reply.output_ids) == LONG.max_new_tokens
    assert_serves(pool.clients[0].url, models[1], version=1)


def test_requests_that_abort_ends_are_taken_up_by_the_policy_with_versions_kept(
    pool: SGLangPool, models: tuple[Any, Any]
) -> None:
    policy = SGLangWrapper(pool, input_mode="tokens", generate_kwargs={"max_new_tokens": 400, "ignore_eos": True})
    prompts = lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(ids))) for ids in IDS])
    out, report = push_in_the_middle(pool, lambda: policy(prompts), models[1], SyncConfig(pause="abort"))
    assert report.pause == "abort"
    answers, scores = rows(out, "tokens", "response"), rows(out, "log_probs", "response")
    versions = rows(out, "generation", "weight_version")
    for prompt, ids, log_probs, version in zip(IDS, answers, scores, versions, strict=True):
        assert len(ids) == len(version) == 400
        assert version.unique(return_counts=False).tolist() == [0, 1]
        assert (version.diff() >= 0).all()
        reply = GenerateReply(output_ids=ids.tolist(), output_logprobs=log_probs.tolist())
        for number, model in enumerate(models):
            assert gaps(reply, prompt, model)[version == number].max() < ATOL
    assert set(out["generation"].policy_version.tolist()) == {0}


def test_in_place_goes_on_at_once_and_new_requests_see_no_stale_prefix(
    pool: SGLangPool, models: tuple[Any, Any]
) -> None:
    prompt = [(index * 7) % 300 + 5 for index in range(64)]
    short = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
    pool.generate([prompt], short)
    assert pool.generate([prompt], short)[0].cached_tokens > 0
    config = SyncConfig(pause="in_place")
    replies, report = push_in_the_middle(pool, lambda: pool.generate(IDS, LONG), models[1], config)
    assert report.pause == "in_place"
    for reply in replies:
        assert len(reply.output_ids) == LONG.max_new_tokens
        assert [version_number(span.version) for span in reply.weight_spans if span.end > span.start] == [0, 1]
    (fresh,) = pool.generate([prompt], short)
    assert fresh.cached_tokens == 0
    assert_log_probs(fresh, prompt, models[1])
    (again,) = pool.generate([prompt], short)
    assert again.cached_tokens > 0
    assert_log_probs(again, prompt, models[1])


def test_a_flush_empties_the_prefix_cache_and_a_salt_hides_it_from_this_pool_alone(
    pool: SGLangPool, models: tuple[Any, Any]
) -> None:
    """A pool without the salt is the control of the test above: the same prompt, the same update, a stale prefix."""
    prompt = [(index * 11) % 300 + 5 for index in range(64)]
    short = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
    unsalted = SGLangPool([SGLangClient(client.url) for client in pool.clients])
    for cache in ("flush", "salt"):
        with closing(WeightSync(pool, SyncConfig(cache="flush"))) as sync:
            sync.push(models[0])
        unsalted.generate([prompt], short)  # fills the cache with the old weights' prefix
        with closing(WeightSync(pool, SyncConfig(cache=cache))) as sync:
            sync.push(models[1])
        (reply,) = pool.generate([prompt], short)
        assert reply.cached_tokens == 0, cache
        assert_log_probs(reply, prompt, models[1])
    (stale,) = unsalted.generate([prompt], short)
    assert stale.cached_tokens > 0
    assert gaps(stale, prompt, models[1]).max() > ATOL


def test_requests_that_come_during_an_update_wait_and_get_the_new_weights(
    pool: SGLangPool, models: tuple[Any, Any]
) -> None:
    requests: list[Task[Any]] = []

    def ask() -> list[GenerateReply]:
        return pool.generate([IDS[0]], SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True))

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for index, pair in enumerate(models[1].state_dict().items()):
            if index == 12:  # some buckets are over, some are not
                requests.append(Task(ask, name="request"))
            yield pair

    with closing(WeightSync(pool, SyncConfig(bucket_bytes=20_000, stage="off"))) as sync:
        sync.push(tensors())
    ((reply,),) = [request.outcome().unwrap() for request in requests]
    assert version_number(reply.weight_version) == 1
    assert_log_probs(reply, IDS[0], models[1])
