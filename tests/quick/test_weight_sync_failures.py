"""What an update that fails, or goes to some servers or tensors only, leaves in the pool's state; on fake servers."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fake_sglang import FakeServer, Fault
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import AsyncSGLang, ConfigError, SGLangWeightSyncScheme, SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.engine.monitor import restart_server
from torchrl_sglang.errors import ServerUnreachableError
from torchrl_sglang.pool import PoolState, ServerState, SGLangPool
from torchrl_sglang.pool.dead_servers import DeadServerTracker
from torchrl_sglang.protocol.control import build_set_version

UPDATE = "/update_weights_from_distributed"
PLAIN = SyncConfig(verify="off")
TAKEOVER = SyncConfig(verify="off", takeover=True)  # do not wait for the trainer whose mark a server has


@pytest.fixture
def tensors(tiny_llama: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(tiny_llama)


def pool_of(*servers: FakeServer) -> SGLangPool:
    return SGLangPool([SGLangClient(server.url) for server in servers])


def count(server: FakeServer, path: str) -> int:
    return sum(event["path"] == path for event in server.events)


# --------------------------------------------------------------------------------------------------------- failures


def test_servers_that_pass_verification_serve_the_new_version_although_another_one_fails(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    good, bad = make(), make(faults=(Fault(path="/weights_checker", action="refuse", nth=2),))
    pool = pool_of(good, bad)
    sync = WeightSync(pool, SyncConfig(verify="full"))
    pool.connect()
    pool.quarantine(good.url, "until the next update")
    with pytest.raises(WeightUpdateError) as failure:
        sync.push(tensors)
    assert failure.value.server_weights == {good.url: "new", bad.url: "mixed"}
    assert [client.url for client in pool.healthy] == [good.url]
    assert pool.weight_version == 1
    sync.close()


def test_a_group_per_server_is_formed_anew_for_all_servers_when_one_did_not_join(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    """A server that is in no group would be reported as updated and keep its old weights."""
    servers = [make(), make()]
    pool = pool_of(*servers)
    sync = WeightSync(pool, SyncConfig(verify="off", groups="per_server"))
    sync.push(tensors)
    servers[0].arm(Fault(path="/end_weight_update", action="refuse"))
    with pytest.raises(WeightUpdateError):
        sync.push(tensors)
    servers[1].arm(Fault(path="/init_weights_update_group", action="refuse"))
    with pytest.raises(WeightUpdateError, match="could not join"):
        sync.push(tensors)
    buckets = [count(server, UPDATE) for server in servers]
    sync.push(tensors)
    assert [count(server, UPDATE) - before for server, before in zip(servers, buckets, strict=True)] == [1, 1]
    sync.close()


def test_a_server_with_mixed_weights_that_refuses_the_first_bucket_still_has_mixed_weights(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    refusal = Fault(path=UPDATE, action="refuse", message="Failed to receive weights: no")
    for held, weights in (("4", "old"), ("dirty-4@another", "mixed")):
        server = make(weight_version=held, faults=(refusal,))
        sync = WeightSync(pool_of(server), TAKEOVER)
        with pytest.raises(WeightUpdateError) as failure:
            sync.push(tensors)
        assert failure.value.server_weights == {server.url: weights}
        assert (count(server, "/continue_generation") == 0) is (weights == "mixed")
        sync.close()


def test_an_update_that_fails_at_once_leaves_a_server_with_mixed_weights_paused(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    mixed = make(weight_version="dirty-1@another")
    other = make(faults=(Fault(path="/pause_generation", action="refuse"),))
    sync = WeightSync(pool_of(mixed, other), TAKEOVER)
    with pytest.raises(WeightUpdateError) as failure:
        sync.push(tensors)
    assert failure.value.server_weights == {mixed.url: "mixed", other.url: "old"}
    assert count(mixed, "/continue_generation") == 0
    sync.push(tensors)
    sync.close()


def test_a_dead_server_that_was_quarantined_while_others_were_polled_is_not_restored() -> None:
    state = PoolState(["http://a:1", "http://b:1"])
    asked, go_on = threading.Event(), threading.Event()

    class Slow:
        def __init__(self, url: str) -> None:
            self.url = url

        def weight_version(self) -> str:
            asked.set()
            assert go_on.wait(10)
            return "default"

    restored: list[str] = []

    def restore(before: ServerState, version: str) -> None:
        if state.restored(before.url, based_on=before):
            restored.append(before.url)

    tracker = DeadServerTracker(state, restore)
    servers = [Slow(url) for url in state.servers]
    for server in servers:
        state.died(server.url, "nothing listens")
    poll = threading.Thread(target=tracker.poll, args=(servers,))
    poll.start()
    assert asked.wait(10)
    state.quarantined("http://b:1", "maintenance")
    go_on.set()
    poll.join(10)
    assert restored == ["http://a:1"]


def test_a_restarted_server_counts_as_a_new_process_also_if_it_does_not_answer_yet() -> None:
    """Otherwise the next update would use a process group that its old process was in."""
    pool = SGLangPool([SGLangClient("http://127.0.0.1:9", ClientConfig(connect_retries=0))])

    class Server:
        def start(self, **settings: Any) -> None: ...

        def kill(self) -> None: ...

    with pytest.raises(ServerUnreachableError):
        restart_server(pool, pool.clients[0], Server())  # type: ignore[arg-type]
    assert pool.state.server("http://127.0.0.1:9").restarts == 1


# ---------------------------------------------------------------------------------------------------- partial updates


def test_a_partial_update_is_refused_on_weights_that_an_update_has_met_but_not_replaced(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    server = make()
    pool = pool_of(server)
    sync = WeightSync(pool, SyncConfig(verify="off", only_trainable=True))
    sync.push(tensors)
    pool.clients[0].send(build_set_version("7@another"))
    server.arm(Fault(path="/begin_weight_update", action="refuse"))
    with pytest.raises(WeightUpdateError):
        sync.push(tensors)
    with pytest.raises(ConfigError, match="'7@another', which this trainer did not send"):
        sync.push({"lm_head.weight": tensors["lm_head.weight"]}, partial=True)
    sync.push(tensors)
    sync.push({"lm_head.weight": tensors["lm_head.weight"]}, partial=True)
    sync.close()


def test_a_partial_update_is_refused_on_a_server_that_has_missed_an_update(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    servers = [make(), make()]
    pool = pool_of(*servers)
    sync = WeightSync(pool, PLAIN)
    sync.push(tensors)
    servers[1].arm(Fault(path="/ready", action="drop", times=0))
    sync.push(tensors)
    servers[1].disarm()
    with pytest.raises(ConfigError, match="has missed updates, the last one to version 2: push all"):
        sync.push({"lm_head.weight": tensors["lm_head.weight"]}, partial=True)
    sync.push(tensors)
    sync.push({"lm_head.weight": tensors["lm_head.weight"]}, partial=True)
    sync.close()


def test_the_tensors_of_a_partial_update_are_not_sent_again_as_if_they_were_the_model(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    sync = WeightSync(pool_of(make()), PLAIN)
    sync.push(tensors)
    sync.push({"lm_head.weight": tensors["lm_head.weight"]}, partial=True)
    with pytest.raises(ConfigError, match=r"no weights to send again: push\(model\) them"):
        sync.heal()
    sync.push(tensors)
    assert sync.heal() is not None
    sync.close()


def test_after_a_partial_update_only_the_whole_model_makes_a_server_complete(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    pool = pool_of(make())
    sync = WeightSync(pool, PLAIN)

    def complete_from() -> str:
        return pool.state.server(pool.clients[0].url).complete_from

    for weights, partial, expected in (
        ({"lm_head.weight": tensors["lm_head.weight"]}, True, ""),
        (tensors, False, sync.owner),
        ({"lm_head.weight": tensors["lm_head.weight"]}, True, sync.owner),
    ):
        sync.push(weights, partial=partial)
        assert complete_from() == expected
    sync.close()


def test_a_folder_of_a_failed_partial_update_is_no_checkpoint_for_a_restarted_server(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    servers = [make(), make()]
    pool = pool_of(*servers)
    sync = WeightSync(pool, SyncConfig(verify="off", transport="disk", disk_dir=tmp_path))
    sync.push(tensors)
    assert pool.state.weights.saved is not None
    servers[0].arm(Fault(path="/continue_generation", action="refuse"))
    with pytest.raises(WeightUpdateError):
        sync.push({"lm_head.weight": tensors["lm_head.weight"]}, partial=True)
    assert (pool.weight_version, pool.state.weights.saved) == (2, None)


# -------------------------------------------------------------------------------------------------- the shared settings


def test_a_refused_group_address_leaves_the_engine_with_the_settings_it_had(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    with AsyncSGLang.connect(make().url) as engine:
        scheme = SGLangWeightSyncScheme(engine, config=PLAIN)
        with pytest.raises(ConfigError, match="another SyncConfig"):
            engine.init_weight_update_group("127.0.0.1", 29500)
        assert engine.update_weights(tensors) is not None
        scheme.shutdown()


def test_the_config_of_a_scheme_holds_until_its_shutdown_although_the_engine_uses_it_too(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    with AsyncSGLang.connect(make().url) as engine:
        scheme = SGLangWeightSyncScheme(engine, config=PLAIN)
        engine.update_weights(tensors)
        scheme.shutdown()
        other = SGLangWeightSyncScheme(engine, config=SyncConfig(verify="off", bucket_bytes=50_000))
        engine.update_weights(tensors)
        assert engine.weights.sync is other.sync
        assert other.last_report is not None
        assert other.last_report.num_buckets > 1
        other.shutdown()


@pytest.mark.parametrize("transport", ["broadcast", "lora"])
def test_checksums_are_compared_of_whole_models_not_of_adapters(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor], tiny_llama: Path, transport: Any
) -> None:
    """An update of the adapter changes no tensor of the base model."""
    server = make(enable_lora=True)
    sync = WeightSync(pool_of(server), SyncConfig(transport=transport, verify="full", verify_atol=1e9))
    weights: Any = tensors
    if transport == "lora":
        peft = pytest.importorskip("peft")
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        weights = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert sync.push(weights) is not None
    before_and_after = 2 if transport == "broadcast" else 0
    assert count(server, "/weights_checker") == before_and_after
    sync.close()


def test_an_engine_that_nobody_uses_any_more_ends_although_it_shared_its_sync_with_a_scheme(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    gc.disable()  # a reference cycle would keep the engine until the next collection
    try:
        engine = AsyncSGLang.connect(make().url)
        scheme = SGLangWeightSyncScheme(engine, config=PLAIN)
        engine.update_weights(tensors)
        ended = [weakref.ref(engine), weakref.ref(scheme.sync)]
        del engine, scheme
        assert [ref() for ref in ended] == [None, None]
    finally:
        gc.enable()


def test_a_sync_made_by_hand_outlives_the_schemes_that_use_it(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    server = make()
    pool = pool_of(server)
    sync = WeightSync(pool, PLAIN)
    sync.push(tensors)
    scheme = SGLangWeightSyncScheme(pool)
    assert scheme.sync is sync
    scheme.shutdown()
    assert pool.weight_sync is sync
    assert sync.heal() is not None
    assert count(server, "/init_weights_update_group") == 1
    sync.close()


def test_a_scheme_for_something_else_that_generates_is_refused() -> None:
    class Model:
        def generate(self) -> None: ...

    with pytest.raises(ConfigError, match="servers must be an AsyncSGLang, an SGLangPool or URLs, got Model"):
        SGLangWeightSyncScheme(Model())  # type: ignore[arg-type]
