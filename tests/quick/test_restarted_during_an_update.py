"""A server that somebody else restarts while an update of others fails is not told the version that it had before."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServer, Fault
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import SamplingParams, SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool

ONE = SamplingParams(max_new_tokens=1)
MARK = "/update_weight_version"


def test_a_new_process_keeps_its_own_version_and_is_left_out_until_the_next_update(
    make: Callable[..., FakeServer], tiny_llama: Path
) -> None:
    restarted, refusing = make(), make()
    pool = SGLangPool([SGLangClient(server.url) for server in (restarted, refusing)])
    sync = WeightSync(pool, SyncConfig(verify="off"))
    tensors = read_checkpoint(tiny_llama)
    sync.push(tensors)
    refusing.arm(Fault(path=MARK, action="slow", seconds=1.0), Fault(path=MARK, action="refuse", at="handled"))
    marked = SGLangClient(restarted.url)
    pushing = Task(lambda: sync.push(tensors), name="push")
    while not marked.weight_version().startswith("dirty-"):
        assert not pushing.done
        time.sleep(0.005)
    restarted.set_state(weight_version="default")  # as a new process has it
    error = pushing.outcome().error
    assert isinstance(error, WeightUpdateError)
    assert error.server_weights == {restarted.url: "mixed", refusing.url: "old"}
    assert list(pool.quarantined) == [restarted.url]
    assert pool.state.server(restarted.url).restarts == 1
    assert SGLangClient(restarted.url).weight_version() == "default"
    assert {reply.server for reply in pool.generate([[1], [2]], ONE)} == {refusing.url}
    report = sync.push(tensors)
    assert report is not None
    assert set(report.server_weights.values()) == {"new"}
    assert not pool.quarantined
    sync.close()


def test_servers_whose_update_fails_get_their_version_back(make: Callable[..., FakeServer], tiny_llama: Path) -> None:
    servers = [make(), make()]
    pool = SGLangPool([SGLangClient(server.url) for server in servers])
    sync = WeightSync(pool, SyncConfig(verify="off"))
    tensors = read_checkpoint(tiny_llama)
    sync.push(tensors)
    before = [SGLangClient(server.url).weight_version() for server in servers]
    for path in ("/pause_generation", MARK, "/begin_weight_update"):
        servers[1].arm(Fault(path=path, action="refuse"))
        with pytest.raises(WeightUpdateError) as failed:
            sync.push(tensors)
        assert set(failed.value.server_weights.values()) == {"old"}, path
        assert [SGLangClient(server.url).weight_version() for server in servers] == before
        assert not pool.quarantined
    sync.close()
