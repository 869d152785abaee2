"""A server whose process was replaced between two requests of a pool whose weights were never synced."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as with_changes
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServer, Fault
from tests.quick.pools import PROMPTS, SHORT, pool_of, servers_of
from torchrl_sglang import ServerError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import replaced_servers

Make = Callable[..., FakeServer]


@pytest.fixture(autouse=True)
def servers_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaced_servers, "_QUIET_S", 0.0)


def test_another_model_gets_no_request(make: Make, make_model: Callable[..., Path], replace: Make) -> None:
    first, second = make(), make()
    pool = pool_of(first, second)
    assert servers_of(pool) == {first.url, second.url}
    other = replace(second, model_path=make_model(arch="qwen2", seed=0))
    assert servers_of(pool) == {first.url}
    assert "one pool needs servers of one model" in pool.quarantined[second.url]
    assert not [event for event in other.events if event["path"] == "/generate"]


def test_another_checkpoint_on_the_only_server_is_an_error(make: Make, tiny_llama_b: Path, replace: Make) -> None:
    server = make()
    pool = pool_of(server)
    servers_of(pool)
    other = replace(server, model_path=tiny_llama_b)
    with pytest.raises(ServerError, match="has come back with another checkpoint"):
        pool.generate(PROMPTS, SHORT)
    with pytest.raises(ServerError, match="has come back with another checkpoint"):
        list(pool.stream([1, 2], SHORT))
    assert not [event for event in other.events if event["path"] == "/generate"]


def test_the_same_model_goes_on_and_its_settings_are_learnt(make: Make, replace: Make) -> None:
    server = make(max_total_tokens=1024)
    pool = pool_of(server)
    before = pool.max_prompt_tokens
    assert before is not None
    restarts = pool.state.server(server.url).restarts
    replace(server, max_total_tokens=2048)
    assert servers_of(pool) == {server.url}
    assert pool.max_prompt_tokens == before + 1024
    assert pool.state.server(server.url).restarts == restarts + 1


def test_nothing_is_asked_in_a_pool_that_is_busy_or_has_seen_synced_weights(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    never, synced = make(), make(weight_version="3@t")

    def asked(server: FakeServer) -> int:
        return sum(event["path"] == "/server_info" for event in server.events)

    pool, other = pool_of(never), pool_of(synced)
    before = asked(synced)
    servers_of(other)
    assert asked(synced) == before
    before = asked(never)
    servers_of(pool)
    assert asked(never) == before + 1
    monkeypatch.setattr(replaced_servers, "_QUIET_S", 600.0)
    for _ in range(3):
        servers_of(pool)
    assert asked(never) == before + 1


def test_a_server_that_can_not_say_what_it_is_is_used_as_before(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make()
    pool = pool_of(server)
    (client,) = pool.clients
    info = client.info
    raw = {name: value for name, value in json.loads(json.dumps(info.raw)).items() if name != "random_seed"}
    client._info = with_changes(info, raw=raw)
    send = SGLangClient.send

    def without_seed(self: SGLangClient, request: object, **given: object) -> object:
        answer = send(self, request, **given)  # type: ignore[arg-type]
        if isinstance(answer, dict):
            answer.pop("random_seed", None)
        return answer

    monkeypatch.setattr(SGLangClient, "send", without_seed)
    assert servers_of(pool) == {server.url}


def test_a_server_that_does_not_say_what_it_is_is_asked_once_and_not_by_each_thread(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaced_servers, "_QUIET_S", 600.0)
    monkeypatch.setattr(replaced_servers, "_TIMEOUT_S", 0.3)
    server = make()
    pool = pool_of(server)
    server.arm(Fault(path="/server_info", action="hang", times=0))
    asked = sum(event["path"] == "/server_info" for event in server.events)
    pool.clients[0].heard_at = -math.inf
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: pool.poll_dead_servers(), range(8)))
    server.disarm()
    assert sum(event["path"] == "/server_info" for event in server.events) == asked + 1
    assert servers_of(pool) == {server.url}
