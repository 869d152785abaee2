"""The real sglang-router before fake servers: who gets what, who is in, and what a dead server costs.

``test_engine.py`` has it before real servers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fake_sglang import FakeSettings, Fault
from tests.loop.forked_processes import ForkedServer, ProcessFactory, wait_until
from torchrl_sglang import AsyncSGLang, ConfigError, RouterConfig, SamplingParams, ServerError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import RouterClient, SGLangPool
from torchrl_sglang.protocol.generate import build_generate
from torchrl_sglang.server import SGLangRouter

PROMPTS = [[index + 3, 7, 8] for index in range(8)]
SAMPLING = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)
KEY = "open-sesame"


@pytest.fixture(scope="module")
def router() -> Iterator[SGLangRouter]:
    if importlib.util.find_spec("sglang_router") is None:
        assert not os.environ.get("CI"), "sglang-router is not installed: make env"
        pytest.skip("sglang-router is not installed")
    # One that balances request by request, so that a few prompts reach both servers.
    made = SGLangRouter(RouterConfig(policy="round_robin"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def behind(
    router: SGLangRouter, processes: ProcessFactory, tiny_llama: Path
) -> Iterator[Callable[..., tuple[SGLangPool, list[ForkedServer]]]]:
    pools: list[SGLangPool] = []

    def start(count: int = 2, **settings: object) -> tuple[SGLangPool, list[ForkedServer]]:
        fakes = [processes.start_server(FakeSettings(model_path=tiny_llama, **settings)) for _ in range(count)]  # type: ignore[arg-type]
        key = settings.get("api_key")
        config = ClientConfig(api_key=str(key) if key else None)
        pools.append(SGLangPool([SGLangClient(f.url, config) for f in fakes], router=RouterClient(router.url, config)))
        pools[-1].connect()
        return pools[-1], fakes

    yield start
    for pool in pools:
        assert pool.router is not None
        for client in pool.clients:
            pool.router.leave(client.url)
        pool.close()


def test_generation_goes_through_the_router_and_control_past_it(
    behind: Callable[..., tuple[SGLangPool, list[ForkedServer]]], router: SGLangRouter
) -> None:
    pool, fakes = behind()
    with AsyncSGLang.connect(fakes[0].url) as direct:
        expected = [reply.output_ids for reply in direct.pool.generate(PROMPTS, SAMPLING)]
    seen = [fake.requests("/generate") for fake in fakes]
    replies = pool.generate(PROMPTS, SAMPLING)
    assert [reply.output_ids for reply in replies] == expected
    assert {reply.server for reply in replies} == {router.url}
    new = [fake.requests("/generate") - before for fake, before in zip(fakes, seen, strict=True)]
    assert sum(new) == len(PROMPTS), "one request per prompt: the router balances requests"
    assert min(new) >= 2
    assert [r.output_ids for r in pool.stream(PROMPTS[0], SAMPLING)][-1] == expected[0]
    with AsyncSGLang(pool) as engine:
        engine.flush_cache()
        assert [fake.requests("/flush_cache") for fake in fakes] == [1, 1]


def test_what_the_router_would_leave_out_goes_to_the_servers_themselves(
    behind: Callable[..., tuple[SGLangPool, list[ForkedServer]]], router: SGLangRouter
) -> None:
    pool, _ = behind()
    counted: list[int] = []
    biased = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True, logit_bias={"9": 100.0})
    urls = {client.url for client in pool.clients}
    assert {reply.server for reply in pool.generate(PROMPTS, biased)} <= urls
    assert {reply.server for reply in pool.generate(PROMPTS, SAMPLING, progress=counted.append)} <= urls
    assert sum(counted) == len(PROMPTS) * SAMPLING.max_new_tokens


def test_servers_leave_and_come_back_with_quarantine(
    behind: Callable[..., tuple[SGLangPool, list[ForkedServer]]], router: SGLangRouter
) -> None:
    pool, fakes = behind()
    front = RouterClient(router.url, ClientConfig())
    assert front.workers().keys() == {fake.url for fake in fakes}
    pool.quarantine(fakes[0].url, "a test")
    assert front.workers().keys() == {fakes[1].url}
    before = fakes[0].requests("/generate")
    pool.generate(PROMPTS, SAMPLING)
    assert fakes[0].requests("/generate") == before
    pool.quarantine(fakes[1].url, "a test")
    with pytest.raises(ServerError, match=r"no server is left behind the router .*8 of 8 prompts have no answer"):
        pool.generate(PROMPTS, SAMPLING)
    for fake in fakes:
        pool.restore(fake.url, based_on=pool.state.server(fake.url))
    assert front.workers().keys() == {fake.url for fake in fakes}
    assert len(pool.generate(PROMPTS, SAMPLING)) == len(PROMPTS)


def test_prompts_on_a_server_that_is_killed_are_generated_by_the_other(
    behind: Callable[..., tuple[SGLangPool, list[ForkedServer]]], router: SGLangRouter
) -> None:
    pool, fakes = behind(step_s=0.02)
    expected = [reply.output_ids for reply in pool.generate(PROMPTS, LONG)]
    seen = [fake.requests("/generate") for fake in fakes]
    batch = Task(lambda: pool.generate(PROMPTS, LONG), name="batch")
    wait_until(lambda: sum(f.requests("/generate") for f in fakes) == sum(seen) + len(PROMPTS), "no batch came", 30)
    lost = fakes[0].requests("/generate") - seen[0]
    assert lost > 0
    fakes[0].kill()
    assert [reply.output_ids for reply in batch.outcome().unwrap()] == expected
    assert fakes[1].requests("/generate") == seen[1] + len(PROMPTS), "its own and the lost ones, each once"
    assert list(pool.quarantined) == [fakes[0].url]
    assert RouterClient(router.url, ClientConfig()).workers().keys() == {fakes[1].url}


def test_a_request_lost_on_a_living_server_is_sent_once(
    behind: Callable[..., tuple[SGLangPool, list[ForkedServer]]],
) -> None:
    pool, fakes = behind()
    fakes[0].arm(Fault(path="/generate", action="drop", at="handled"))
    with pytest.raises(ServerError, match="error sending request"):
        pool.generate(PROMPTS, SAMPLING)
    assert sum(fake.requests("/generate") for fake in fakes) == len(PROMPTS)
    assert not pool.quarantined


def test_the_router_hands_on_keys_and_knows_none_itself(
    behind: Callable[..., tuple[SGLangPool, list[ForkedServer]]], router: SGLangRouter
) -> None:
    pool, _ = behind(api_key=KEY)
    assert len(pool.generate(PROMPTS, SAMPLING)) == len(PROMPTS)
    stranger = SGLangClient(router.url, ClientConfig())
    with pytest.raises(ServerError, match="401"):
        stranger.send(build_generate(PROMPTS, SAMPLING))
    assert KEY not in router.log_tail(10_000)


def test_a_router_without_its_package_or_with_a_bad_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not an executable file"):
        SGLangRouter(RouterConfig(python="/no/python")).start()
    with pytest.raises(ConfigError, match="policy must be one of"):
        RouterConfig(policy="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="each request brings its own key"):
        RouterConfig(extra_args=("--api-key", "x"))
    with pytest.raises(ConfigError, match="unknown argument 'routr'. Did you mean 'router'"):
        AsyncSGLang.from_pretrained("m", routr=True)
