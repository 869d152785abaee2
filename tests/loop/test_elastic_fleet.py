"""Real servers that join and leave while others generate; each token is compared with the model of its version."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.loop.adapter_cases import adapted, lora_flags
from tests.loop.sync_cases import PROMPTS, assert_serves, load
from torchrl_sglang import AsyncSGLang, SamplingParams, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.version import version_number
from torchrl_sglang.server import SGLangServer

Launch = Callable[..., SGLangServer]

NUM_SYNCS = 200
CHANGE_EVERY = 5
SAMPLING = SamplingParams(max_new_tokens=8, temperature=1.0, ignore_eos=True)
ATOL = 1e-3


class Rollouts:
    """Threads that generate until they are stopped, and keep every answer."""

    def __init__(self, pool: SGLangPool, num_threads: int, num_prompts: int) -> None:
        self.answers: list[tuple[list[int], GenerateReply]] = []
        self.asked = 0
        self._pool = pool
        self._num_prompts = num_prompts
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._tasks = [Task(lambda number=number: self._run(number), name="rollout") for number in range(num_threads)]

    def _run(self, number: int) -> None:
        turn = 0
        while not self._done.is_set():
            prompts = [[5 + number, 7 + turn % 300, 9 + index] for index in range(self._num_prompts)]
            turn += 1
            with self._lock:
                self.asked += len(prompts)
            replies = self._pool.generate(prompts, SAMPLING)
            with self._lock:
                self.answers.extend(zip(prompts, replies, strict=True))

    def stop(self) -> None:
        self._done.set()
        for task in self._tasks:
            task.outcome().unwrap()


def wrong_tokens(answers: list[tuple[list[int], GenerateReply]], models: dict[int, dict[str, Any]], model: Any) -> int:
    """Number of tokens whose log-prob is not that of the model of the version that they carry."""
    by_version: dict[int, list[tuple[list[int], GenerateReply]]] = defaultdict(list)
    wrong = 0
    for prompt, reply in answers:
        versions = {version_number(span.version) for span in reply.weight_spans}
        if len(versions) == 1 and len(reply.output_ids) == SAMPLING.max_new_tokens:
            by_version[versions.pop()].append((prompt, reply))
    for version, group in by_version.items():
        model.load_state_dict(models[version])
        ids = torch.tensor([[*prompt, *reply.output_ids] for prompt, reply in group])
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), -1)
        expected = scores.gather(-1, ids[:, 1:, None])[..., 0][:, -SAMPLING.max_new_tokens :]
        got = torch.tensor([reply.output_logprobs for _, reply in group])
        wrong += int(((expected - got).abs() > ATOL).sum())
    return wrong


def train_step(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_prompt_is_lost_or_answered_twice_in_200_syncs_with_a_server_joining_or_leaving_every_fifth(
    launch_server: Launch, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = launch_server(), launch_server()
    pool = SGLangPool([SGLangClient(first.url)])
    pool.connect()
    model, checker = load(tiny_llama), load(tiny_llama)
    models = {0: state_of(model)}
    join_s: list[float] = []
    sync_s: list[float] = []
    waited = 0
    with closing(WeightSync(pool, SyncConfig(verify="off"))) as sync:
        rollouts = Rollouts(pool, num_threads=2, num_prompts=4)
        try:
            for step in range(1, NUM_SYNCS + 1):
                train_step(model, step)
                models[step] = state_of(model)
                start = time.monotonic()
                report = sync.push(model)
                sync_s.append(time.monotonic() - start)
                assert report is not None
                assert report.version == step
                if step % CHANGE_EVERY:
                    continue
                if len(pool.clients) == 2:
                    pool.remove(second.url, drain=step % 20 == 0)
                    continue
                if step % 3 == 0:  # in the middle of the training step: it has to wait for the next sync
                    train_step(model, -step)
                start = time.monotonic()
                pool.add(second.url)
                if pool.quarantined:
                    waited += 1
                else:
                    join_s.append(time.monotonic() - start)
        finally:
            rollouts.stop()
    assert len(rollouts.answers) == rollouts.asked, "lost, or answered twice"
    assert {reply.server for _, reply in rollouts.answers} == {first.url, second.url}
    assert all(reply.finish_reason in ("length", "abort") for _, reply in rollouts.answers)
    versions = {version_number(reply.weight_version) for _, reply in rollouts.answers}
    assert len(versions) > NUM_SYNCS // 2
    assert wrong_tokens(rollouts.answers, models, checker) == 0
    assert waited > 0
    join, one_sync = statistics.median(join_s), statistics.median(sync_s)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(rollouts.answers)} answers in {NUM_SYNCS} syncs, {len(versions)} versions seen; joining "
            f"{join:.2f} s where a sync takes {one_sync:.2f} s (medians of {len(join_s)} and {len(sync_s)})\n"
        )
    assert join < 4 * one_sync + 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_scales_up_and_down_between_two_syncs(
    needs_sglang: None, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny_llama)
    with AsyncSGLang.from_pretrained(str(tiny_llama), device="cpu", api_key=False, start_timeout_s=300) as engine:
        train_step(model, 1)
        engine.update_weights(model)
        started_s = time.monotonic()
        rollouts = Rollouts(engine.pool, num_threads=1, num_prompts=2)
        engine.scale_to(2)
        scale_s = time.monotonic() - started_s
        urls = [client.url for client in engine.pool.clients]
        assert len(urls) == len(engine.servers) == 2
        assert not engine.pool.quarantined
        assert_serves(urls, model, version=1)
        processes = [process for server in engine.servers for process in tree(server)]
        train_step(model, 2)
        start = time.monotonic()
        engine.update_weights(model)
        sync_s = time.monotonic() - start
        assert_serves(urls, model, version=2)
        engine.remove(urls[0])  # also the first one
        assert [client.url for client in engine.pool.clients] == [urls[1]]
        engine.update_weights(model)
        rollouts.stop()
        assert len(rollouts.answers) == rollouts.asked
        assert_serves(urls[1], model, version=3)
        with capsys.disabled():
            sys.stdout.write(
                f"\nscale_to(2): {scale_s:.1f} s, a start and a join; a sync with a new group takes {sync_s:.2f} s"
            )
    psutil.wait_procs(processes, timeout=20)
    assert not [process for process in processes if process.is_running()]


def tree(server: SGLangServer) -> list[psutil.Process]:
    assert server.pid is not None
    main = psutil.Process(server.pid)
    return [main, *main.children(recursive=True)]


@pytest.mark.slow
def test_a_newcomer_gets_the_trainers_adapter(launch_server: Launch, tiny_llama: Path) -> None:
    flags = {"extra_args": lora_flags("q_proj", "v_proj")}
    first, second = launch_server(**flags), launch_server(**flags)
    pool = SGLangPool([SGLangClient(first.url)])
    model = adapted(tiny_llama, [{"target_modules": ["q_proj", "v_proj"]}])
    greedy = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    with closing(WeightSync(pool, SyncConfig(transport="lora"))) as sync:
        sync.push(model)
        expected = pool.generate(PROMPTS, greedy)
        with torch.no_grad():  # the adapter is kept: what the trainer does with its own does not matter
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(1.0)
        pool.add(second.url)
        pool.remove(first.url)
        replies = pool.generate(PROMPTS, greedy)
        assert [reply.output_ids for reply in replies] == [reply.output_ids for reply in expected]
        assert [reply.weight_version for reply in replies] == [reply.weight_version for reply in expected]
        assert {reply.server for reply in replies} == {second.url}


@pytest.mark.slow
def test_turns_of_a_conversation_find_their_prefix_in_the_cache(launch_server: Launch) -> None:
    """Measured by what the servers report as cached. Turns that go anywhere find it half of the time."""
    pool = SGLangPool([SGLangClient(launch_server().url) for _ in range(2)])
    sampling = SamplingParams(max_new_tokens=16, temperature=0, ignore_eos=True)
    conversations = [[11 + number, *range(20, 60)] for number in range(8)]
    hits = []
    for turn in range(4):
        replies = pool.generate(conversations, sampling)
        if turn:
            hits += [reply.cached_tokens / reply.prompt_tokens for reply in replies]
        new = [[*ids, *reply.output_ids, 99, 100 + turn] for ids, reply in zip(conversations, replies, strict=True)]
        conversations = new[turn + 1 :] + new[: turn + 1]  # in another order
    assert min(hits) > 0.85
    pool.close()
