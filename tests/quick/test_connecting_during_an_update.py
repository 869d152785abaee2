"""A pool that connects while another process updates a server waits for that update instead of giving the server up."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeServer
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import SamplingParams, ServerError, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_set_version

ONE_TOKEN = SamplingParams(max_new_tokens=1)


def copy_of(*servers: FakeServer, **config: Any) -> SGLangPool:
    clients = [SGLangClient(server.url, ClientConfig(**config)) for server in servers]
    copy: SGLangPool = pickle.loads(pickle.dumps(SGLangPool(clients)))
    return copy


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_a_request_of_a_copy_that_connects_during_an_update_waits_for_its_end(
    make: Callable[..., FakeServer], call: str
) -> None:
    server = make(weight_version="dirty-5@t.1")
    pool = copy_of(server)
    pool.connect()
    assert list(pool.quarantined) == [server.url]

    def request() -> list[str]:
        if call == "stream":
            return [reply.weight_version for reply in pool.stream([1, 2], ONE_TOKEN)]
        return [reply.weight_version for reply in pool.generate([[1, 2]], ONE_TOKEN)]

    waiting = Task(request, name="waiting")
    assert not waiting.wait(0.5)
    SGLangClient(server.url).send(build_set_version("5@t"))
    assert waiting.wait(20)
    assert set(waiting.outcome().unwrap()) == {"5@t"}
    assert not pool.quarantined
    known = pool.state.server(server.url)
    assert (known.version, known.weights, known.restarts) == ("5@t", "old", 0)


def test_a_server_whose_update_never_ends_is_given_up_after_the_time_of_an_update(
    make: Callable[..., FakeServer],
) -> None:
    server = make(weight_version="dirty-5@t.1")
    pool = copy_of(server, update_timeout_s=0.5)
    with pytest.raises(ServerError, match="another process is updating it, or died in an update"):
        pool.generate([[1, 2]], ONE_TOKEN)


def test_the_other_servers_answer_meanwhile_and_the_next_poll_restores_the_updated_one(
    make: Callable[..., FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrl_sglang.pool.dead_servers._POLL_INTERVAL_S", 0.0)
    busy, other = make(weight_version="dirty-1@t.1"), make()
    pool = copy_of(busy, other)
    assert {reply.server for reply in pool.generate([[1, 2], [3]], ONE_TOKEN)} == {other.url}
    SGLangClient(busy.url).send(build_set_version("1@t"))
    for _ in range(100):
        pool.generate([[1]], ONE_TOKEN)
        if not pool.quarantined:
            break
        threading.Event().wait(0.05)
    assert not pool.quarantined


def test_a_poll_does_not_restore_a_server_that_this_process_is_updating(
    make: Callable[..., FakeServer], tiny_llama: Path
) -> None:
    server = make(weight_version="dirty-1@t.1")
    pool = copy_of(server)
    pool.connect()
    pool.state.update_started(server.url)
    SGLangClient(server.url).send(build_set_version("1@t"))
    pool.poll_dead_servers()
    assert server.url in pool.quarantined
    sync = WeightSync(pool, SyncConfig(verify="off"))
    assert sync.push(read_checkpoint(tiny_llama)) is not None
    sync.close()
    assert not pool.quarantined
