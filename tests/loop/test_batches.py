"""Batches on several servers of which some die: every prompt gets exactly one reply, or the error names the lost ones.

The servers are fake ones in processes of their own, killed while generating; ``test_engine.py`` uses real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeSettings, Fault
from tests.loop.forked_processes import ForkedServer, ProcessFactory, wait_until
from torchrl_sglang import SamplingParams, ServerError, ServerLostError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.messages import GenerateReply

PROMPTS = [[index + 3, 7, 8] for index in range(8)]
SAMPLING = SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)


@pytest.fixture
def serve(processes: ProcessFactory, tiny_llama: Path) -> Callable[..., list[ForkedServer]]:
    def start(count: int, *, step_s: float = 0.02) -> list[ForkedServer]:
        return [processes.start_server(FakeSettings(model_path=tiny_llama, step_s=step_s)) for _ in range(count)]

    return start


def pool_of(servers: list[ForkedServer]) -> SGLangPool:
    pool = SGLangPool([SGLangClient(each.url) for each in servers])
    pool.connect()
    return pool


def start_batch(pool: SGLangPool, servers: list[ForkedServer], **options: Any) -> Task[list[GenerateReply]]:
    """A batch that has reached all servers."""
    batch = Task(lambda: pool.generate(PROMPTS, SAMPLING, **options), name="batch")
    wait_until(lambda: all(each.requests("/generate") for each in servers), "the batch never arrived", 30)
    return batch


@pytest.mark.parametrize("streamed", [False, True])
def test_the_prompts_of_a_server_killed_while_generating_are_generated_by_the_other(
    serve: Callable[..., list[ForkedServer]], streamed: bool
) -> None:
    servers = serve(2)
    pool = pool_of(servers)
    expected = pool.generate(PROMPTS, SAMPLING)
    assert {reply.server for reply in expected} == {each.url for each in servers}
    victim, survivor = servers
    before = survivor.requests("/generate")
    victim_before = victim.requests("/generate")

    batch = Task(
        lambda: pool.generate(PROMPTS, SAMPLING, progress=(lambda _: None) if streamed else None), name="batch"
    )
    wait_until(lambda: victim.requests("/generate") > victim_before, "the batch never arrived", 30)
    victim.kill()
    replies = batch.outcome().unwrap()

    assert [reply.output_ids for reply in replies] == [reply.output_ids for reply in expected]
    assert {reply.server for reply in replies} == {survivor.url}
    lost = len(PROMPTS) // 2
    once_more = lost + 2
    assert survivor.requests("/generate") == before + 1 + once_more, (
        "its own share; the lost prompts alone, and in halves"
    )
    assert list(pool.quarantined) == [victim.url]
    assert "died while generating" in pool.quarantined[victim.url]
    # Later batches need no liveness check.
    assert len(pool.generate(PROMPTS, SAMPLING)) == len(PROMPTS)


def test_when_all_servers_die_the_error_names_the_prompts_without_an_answer(
    serve: Callable[..., list[ForkedServer]],
) -> None:
    servers = serve(2)
    pool = pool_of(servers)
    batch = start_batch(pool, servers)
    for each in servers:
        each.kill()
    with pytest.raises(ServerError, match=r"no server is left, 8 of 8 prompts .*numbers 0, 1, 2, 3, 4, 5, 6, 7") as e:
        batch.outcome().unwrap()
    assert all(each.url in str(e.value) for each in servers)


@pytest.mark.parametrize("servers_alive", [1, 2])
def test_a_request_that_may_have_run_on_a_living_server_is_sent_once(
    serve: Callable[..., list[ForkedServer]], servers_alive: int
) -> None:
    servers = serve(servers_alive, step_s=0)
    pool = pool_of(servers)
    servers[0].arm(Fault(path="/generate", action="drop", at="handled"))
    with pytest.raises(ServerLostError, match="it may have run, so it is not sent again"):
        pool.generate(PROMPTS, SAMPLING)
    assert [each.requests("/generate") for each in servers] == [1] * servers_alive
    assert not pool.quarantined
    assert len(pool.generate(PROMPTS, SAMPLING)) == len(PROMPTS), "the server is alive and stays in use"


def test_a_server_that_hangs_is_not_marked_dead(serve: Callable[..., list[ForkedServer]]) -> None:
    servers = serve(2)
    pool = pool_of(servers)
    batch = start_batch(pool, servers, timeout_s=3.0)
    servers[0].suspend()
    try:
        with pytest.raises(ServerError, match="may still be running"):
            batch.outcome().unwrap()
    finally:
        servers[0].resume()
    assert servers[1].requests("/generate") == 1
    assert not pool.quarantined


def test_an_interrupted_stream_of_a_dead_server_is_an_error(
    serve: Callable[..., list[ForkedServer]],
) -> None:
    (server,) = serve(1)
    pool = pool_of([server])
    stream = pool.stream(PROMPTS[0], SAMPLING)
    assert next(stream).output_ids
    server.kill()
    with pytest.raises(ServerError):
        list(stream)


@pytest.mark.parametrize(
    ("count", "versions"), [(1, ["default", "dirty-4", "3@t"]), (2, ["3@t"])], ids=["alone", "beside another"]
)
def test_a_restarted_server_is_used_again_if_its_weights_are_not_older(
    serve: Callable[..., list[ForkedServer]], processes: ProcessFactory, count: int, versions: list[str]
) -> None:
    servers = serve(count, step_s=0)
    pool = pool_of(servers)
    for each in servers:
        each.set_state(weight_version="3@t")
    assert {reply.weight_version for reply in pool.generate(PROMPTS, SAMPLING)} == {"3@t"}
    victim = servers[0]
    port = int(victim.url.rsplit(":", 1)[1])

    def has_been_queried() -> bool:
        """Whether the pool has queried the new server; it does so in generate()."""
        with contextlib.suppress(ServerError):
            pool.generate(PROMPTS, SAMPLING)
        return victim.requests("/model_info", answered=True) > 0

    for version in versions:
        victim.kill()
        with contextlib.suppress(ServerError):
            pool.generate(PROMPTS, SAMPLING)
        assert victim.url in pool.quarantined
        victim = processes.start_server(replace(servers[0].settings, port=port, weight_version=version))
        wait_until(has_been_queried, "the pool did not query the new server", 30)
        if version == "3@t":
            wait_until(lambda: not pool.quarantined, "it was not restored", 10)
            assert len(pool.generate(PROMPTS, SAMPLING)) == len(PROMPTS)
            assert victim.requests("/generate") > 0
        else:
            assert victim.url in pool.quarantined
            assert victim.requests("/generate") == 0, f"{version} is older than what this pool has seen"
