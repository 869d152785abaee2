"""One record per server: events change it, and a restore that is based on an older record is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fake_sglang import FakeServer, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import AsyncSGLang, ConfigError, SGLangWeightSyncScheme, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ServerLostError
from torchrl_sglang.pool import PoolState, SavedWeights, SGLangPool
from torchrl_sglang.pool.dead_servers import DeadServerTracker
from torchrl_sglang.protocol.version import WeightVersion

A, B = "http://a:1", "http://b:1"


@pytest.fixture
def fake(tiny_llama: Path) -> Iterator[FakeServer]:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server:
        yield server


def test_a_restore_based_on_an_older_record_is_refused() -> None:
    state = PoolState([A, B])
    before = state.died(A, "nothing listens")
    state.quarantined(A, "its weights are mixed after a failed update")
    assert not state.restored(A, based_on=before)
    assert (state.server(A).phase, state.server(B).phase) == ("quarantined", "serving")
    assert state.restored(A, based_on=state.server(A))
    assert (state.server(A).phase, state.server(A).reason) == ("serving", "")


def test_a_poll_that_began_before_an_update_does_not_restore_the_server_that_the_update_has_quarantined() -> None:
    """Otherwise two weight versions would be served side by side."""
    state = PoolState([A])
    asked, go_on = threading.Event(), threading.Event()

    class SlowServer:
        url = A

        def weight_version(self) -> str:
            asked.set()
            assert go_on.wait(10)
            return "3"

    restored: list[bool] = []
    tracker = DeadServerTracker(state, lambda before, version: restored.append(state.restored(A, based_on=before)))
    state.died(A, "nothing listens")
    poll = threading.Thread(target=tracker.poll, args=([SlowServer()],))
    poll.start()
    assert asked.wait(10)
    state.quarantined(A, "its weights are mixed after a failed update")
    go_on.set()
    poll.join(10)
    assert restored == [False]
    assert state.server(A).phase == "quarantined"


def test_a_death_does_not_replace_the_reason_of_a_quarantine_so_no_poll_restores_that_server() -> None:
    state = PoolState([A])
    state.quarantined(A, "its weights are mixed after a failed update")
    assert state.died(A, "nothing listens").phase == "quarantined"
    assert "mixed" in state.server(A).reason


def test_a_server_serves_during_an_update_and_stays_out_of_routing_if_it_was_out_before() -> None:
    state = PoolState([A, B])
    state.quarantined(B, "it holds half-updated weights")
    for url in (A, B):
        state.update_started(url)
        state.update_version_read(url, "dirty-4@t" if url == B else "3@t")
    assert (state.server(A).phase, state.server(A).is_routed, state.server(A).weights) == ("updating", True, "old")
    assert (state.server(B).phase, state.server(B).weights) == ("quarantined", "mixed")
    for url in (A, B):
        state.update_finished(url, "4@t", complete_from="t")
    assert (state.server(A).phase, state.server(B).phase) == ("serving", "quarantined")
    assert {server.weights for server in state.servers.values()} == {"new"}


def test_an_abandoned_update_leaves_the_old_version_and_no_mark() -> None:
    state = PoolState([A])
    state.connected({A: "3@t"})
    state.update_started(A)
    state.update_version_read(A, "3@t")
    assert state.server(A).version_before == "3@t"
    state.update_abandoned(A)
    known = state.server(A)
    assert (known.phase, known.version, known.weights, known.version_before) == ("serving", "3@t", "old", "")


def test_a_new_process_holds_other_weights_and_no_released_memory_but_keeps_its_restart_count() -> None:
    state = PoolState([A])
    state.update_finished(A, "4@t", complete_from="t")
    state.memory_released(A, ["weights"], "offloaded")
    for count in (1, 2):
        known = state.restarted(A, "default")
        assert (known.restarts, known.version, known.complete_from, known.offloaded_tags) == (
            count,
            "default",
            "",
            frozenset(),
        )


def test_no_version_number_names_two_weights() -> None:
    state = PoolState([A])
    state.connected({A: "dirty-4@t"})
    assert (state.weights.version, state.weights.next_version) == (3, 4)
    state.version_claimed(7)
    state.weights_served(WeightVersion(number=5))
    assert state.weights.next_version == 8


def test_events_of_the_weights_replace_one_field_each() -> None:
    state = PoolState([A])
    saved = SavedWeights(version=WeightVersion(number=1), path="/w/version-1")
    state.weights_saved(saved)
    state.caches_salted("1@t")
    state.replies_seen(["3", "2"])
    state.replies_seen(["1"])
    assert (state.weights.saved, state.weights.cache_salt, state.weights.newest_seen.number) == (saved, "1@t", 3)


def test_a_pool_restores_what_a_request_found_dead_only_on_the_word_of_its_record(fake: FakeServer) -> None:
    pool = SGLangPool([SGLangClient(fake.url)])
    pool.connect()
    pool.record_death(fake.url, ServerLostError("it broke"))
    stale = pool.state.server(fake.url)
    quarantined = pool.quarantine(fake.url, "a test")
    assert not pool.restore(fake.url, based_on=stale)
    assert list(pool.quarantined) == [fake.url]
    assert pool.restore(fake.url, based_on=quarantined)
    assert not pool.quarantined


# ---------------------------------------------------------------------------------------------- one sync for each pool


def test_engine_scheme_and_sender_share_one_process_group(fake: FakeServer, tiny_llama: Path) -> None:
    tensors = read_checkpoint(tiny_llama)
    with AsyncSGLang.connect(fake.url) as engine:
        scheme = SGLangWeightSyncScheme(engine, config=SyncConfig(verify="off"))
        sender = scheme.create_sender()
        engine.update_weights(tensors)
        assert sender.update_weights(tensors) is not None
        scheme.sync.push(tensors)
        assert engine.weights.sync is scheme.sync
        assert scheme.last_report is not None
        assert scheme.last_report.version == 3
        joins = [event for event in fake.events if event["path"] == "/init_weights_update_group"]
        assert len(joins) == 1
        scheme.shutdown()
        engine.update_weights(tensors)
        assert len([event for event in fake.events if event["path"] == "/init_weights_update_group"]) == 1


def test_two_different_configs_for_one_pool_are_refused_and_the_first_explicit_one_replaces_the_defaults(
    fake: FakeServer,
) -> None:
    pool = SGLangPool([SGLangClient(fake.url)])
    users = [SGLangWeightSyncScheme(pool)]
    assert users[0].config == SyncConfig()
    users.append(SGLangWeightSyncScheme(pool, config=SyncConfig(verify="off")))
    assert {user.config.verify for user in users} == {"off"}
    assert users[0].sync is users[1].sync
    with pytest.raises(ConfigError, match="another SyncConfig"):
        SGLangWeightSyncScheme(pool, config=SyncConfig(verify="full"))
    for user in users:
        user.shutdown()
    assert SGLangWeightSyncScheme(pool, config=SyncConfig(verify="full")).sync.config.verify == "full"


def test_the_pool_does_not_keep_a_weight_sync_alive(fake: FakeServer) -> None:
    pool = SGLangPool([SGLangClient(fake.url)])
    sync = WeightSync(pool)
    assert pool.weight_sync is sync
    del sync
    assert pool.weight_sync is None


def test_a_model_that_shares_a_pool_with_a_closed_sync_can_be_sent(fake: FakeServer, tiny_llama: Path) -> None:
    tensors: dict[str, torch.Tensor] = read_checkpoint(tiny_llama)
    pool = SGLangPool([SGLangClient(fake.url)])
    first = WeightSync(pool, SyncConfig(verify="off"))
    first.push(tensors)
    first.close()
    scheme = SGLangWeightSyncScheme(pool, config=SyncConfig(verify="off", bucket_bytes=50_000))
    scheme.sync.push(tensors)
    assert pool.weight_version == 2
    scheme.shutdown()
