"""A dead server that answers again and can't be used: the log and its record say why, and it is asked more seldom."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM

from tests.fake_sglang import FakeServer, Fault
from tests.quick.pools import PROMPTS, SHORT, pool_of
from torchrl_sglang import RequestRejectedError, ServerError, SyncConfig, WeightSync
from torchrl_sglang.errors import ServerUnreachableError
from torchrl_sglang.pool import PoolState, SGLangPool, dead_servers
from torchrl_sglang.pool.dead_servers import DeadServerTracker

Make = Callable[..., FakeServer]
LORA = SyncConfig(verify="off", transport="lora")
A, B = "http://a:1", "http://b:1"


def adapted(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


def generate_until(pool: SGLangPool, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        pool.generate(PROMPTS, SHORT)
        time.sleep(0.02)
    assert condition()


def said(caplog: pytest.LogCaptureFixture, url: str) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [line for line in lines if line.startswith(f"{url} stays out of routing: ")]


@pytest.fixture
def polled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_servers, "_POLL_INTERVAL_S", 0.05)
    monkeypatch.setattr(dead_servers, "_LONGEST_INTERVAL_S", 0.05)


@pytest.mark.usefixtures("polled_at_once")
def test_a_server_that_refuses_the_adapter_is_named_once_for_each_reason(
    make: Make, tiny_llama: Path, replace: Make, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make(enable_lora=True), make(enable_lora=True)
    pool = pool_of(first, second)
    with closing(WeightSync(pool, LORA)) as sync:
        sync.push(adapted(tiny_llama))
        again = replace(second, enable_lora=True)
        path = "/load_lora_adapter_from_tensors"

        def tries() -> int:
            return sum(event["path"] == path for event in again.events)

        for count, reason in enumerate(("no room for adapters", "its memory is full"), start=1):
            again.disarm()
            again.arm(Fault(path=path, action="refuse", message=reason, times=0))
            more = tries() + 3
            generate_until(pool, lambda more=more: tries() >= more)  # type: ignore[misc]
            assert reason in pool.quarantined[second.url]
            assert len(said(caplog, second.url)) == count
        again.disarm()
        generate_until(pool, lambda: not pool.quarantined)


@pytest.mark.usefixtures("polled_at_once")
def test_a_server_whose_adapter_nobody_sends_any_more_says_so(
    make: Make, tiny_llama: Path, replace: Make, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make(enable_lora=True), make(enable_lora=True)
    pool = pool_of(first, second)
    with closing(WeightSync(pool, LORA)) as sync:
        sync.push(adapted(tiny_llama))
    replace(second, enable_lora=True)
    generate_until(pool, lambda: "what has sent it is closed" in pool.quarantined.get(second.url, ""))
    assert len(said(caplog, second.url)) == 1
    with closing(WeightSync(pool, LORA)) as sync:
        sync.push(adapted(tiny_llama))
    assert not pool.quarantined


@pytest.mark.usefixtures("polled_at_once")
def test_a_server_that_comes_back_with_older_weights_says_so_and_that_it_is_gone_again(
    make: Make, replace: Make, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make(weight_version="7@t"), make(weight_version="7@t")
    pool = pool_of(first, second)
    second.stop()
    pool.generate(PROMPTS, SHORT)
    older = replace(second, weight_version="6@t")
    generate_until(pool, lambda: "holds weights of version '6@t', older than '7@t'" in pool.quarantined[second.url])
    older.stop()
    generate_until(pool, lambda: "it does not answer any more" in pool.quarantined[second.url])
    assert len(said(caplog, second.url)) == 2
    replace(older, weight_version="7@t")
    generate_until(pool, lambda: not pool.quarantined)


def test_it_is_asked_half_as_often_each_time_until_it_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    state, now, asked, answers = PoolState([A, B]), [1000.0], [], [True]
    monkeypatch.setattr(dead_servers, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Client:
        def __init__(self, url: str) -> None:
            self.url = url

        def weight_version(self) -> str:
            if not answers[0]:
                raise ServerUnreachableError("nothing accepts connections", server=self.url)
            return "default"

    def refused(before: Any, version: str) -> None:
        asked.append(now[0] - 1000.0)
        raise ServerError("it can't be used")

    tracker = DeadServerTracker(state, refused)
    clients: Any = [Client(A), Client(B)]
    state.died(B, "nothing listens")

    def seconds_pass(count: int) -> None:
        for _ in range(count):
            now[0] += 1.0
            tracker.poll(clients)
            tracker.join(10)

    seconds_pass(300)
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 15
    assert gaps[-1] >= 60
    assert len(asked) < 12
    answers[0] = False
    seconds_pass(70)
    answers[0] = True
    asked.clear()
    seconds_pass(20)
    assert len(asked) == 2, "a new process is asked as often as at first"


def test_the_name_of_an_adapter_in_another_error_says_nothing_of_the_server(make: Make, tiny_llama: Path) -> None:
    first, second = make(enable_lora=True), make(enable_lora=True)
    pool = pool_of(first, second)
    with closing(WeightSync(pool, LORA)) as sync:
        sync.push(adapted(tiny_llama))
        adapter = pool.state.weights.adapter
        assert adapter is not None
        with pytest.raises(RequestRejectedError, match="never been loaded: mine"):  # the message lists those it has
            pool.generate(PROMPTS, SHORT, lora="mine")
        assert not pool.quarantined
        for server in (first, second):
            server.arm(Fault(path="/generate", action="refuse", status=500, message=f"no memory for {adapter.name}"))
        with pytest.raises(RequestRejectedError, match="no memory for"):  # it may have run
            pool.generate(PROMPTS, SHORT)
        assert not pool.quarantined
