"""A gateway of another process, over HTTP: the same methods, the same errors, and a collector on it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM

from tests.agent_runs import ask, says, two_turns
from tests.fake_sglang import FakeServer, FakeSettings
from tests.ingress import HTML_502, Ingress, answer
from torchrl_sglang import (
    AgentCollector,
    AgentGateway,
    AsyncSGLang,
    ConfigError,
    OverloadedError,
    ProtocolError,
    RemoteGateway,
    ServerError,
    ServerUnreachableError,
    SessionFinishedError,
    SessionSettings,
    SGLangWeightSyncScheme,
    SyncConfig,
    UnknownSessionError,
)

KEY = "the gateway's own key"


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[FakeServer]:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server:
        yield server


@pytest.fixture(scope="module")
def served(server: FakeServer) -> Iterator[AgentGateway]:
    settings = SessionSettings(overrides={"ignore_eos": True}, max_sessions=40)
    with AgentGateway(server.url, admin_key=KEY, settings=settings) as gateway:
        yield gateway


@pytest.fixture
def gateway(served: AgentGateway) -> Iterator[RemoteGateway]:
    with RemoteGateway(served.url, admin_key=KEY, unreachable_s=0) as gateway:
        yield gateway
    assert served.list_sessions() == []


def rising(task: Any) -> Iterator[float]:
    return map(float, itertools.count())


def test_its_sessions_are_those_of_the_gateway(served: AgentGateway, gateway: RemoteGateway) -> None:
    session = gateway.create_session(tags={"group_id": 3}, ttl_s=60)
    assert session.base_url.startswith(served.url)
    ask(session.base_url, session.api_key, [says("hi")])
    assert gateway.get(session.id).turns == 1
    assert gateway.reward(session.id, 0.5, {"note": "ü"}).status == "finished"
    assert gateway.trajectories(session.id) == served.trajectories(session.id)
    assert gateway.trajectories(session.id)[0].tags == {"group_id": 3}
    with pytest.raises(SessionFinishedError, match="409"):
        gateway.reward(session.id, 1.0)
    gateway.delete(session.id)
    for call in (gateway.get, gateway.trajectories, gateway.delete):
        with pytest.raises(UnknownSessionError):
            call(session.id)


def test_who_has_the_gateways_key_finds_the_sessions_of_others(served: AgentGateway, gateway: RemoteGateway) -> None:
    mine, other = served.create_session(tags={"n": 1}), served.create_session(tags={"n": 2})
    served.reward(other.id, 1.0)
    assert [info.id for info in gateway.list_sessions()] == [mine.id, other.id]
    assert [info.tags for info in gateway.list_sessions("finished")] == [{"n": 2}]
    with pytest.raises(ConfigError, match="status must be active, finished, expired"):
        gateway.list_sessions("done")  # type: ignore[arg-type]
    for session in (mine, other):
        assert gateway.trajectories(session.id) == []
        gateway.delete(session.id)


def test_nobody_sees_the_sessions_of_others_without_a_key(server: FakeServer) -> None:
    with AgentGateway(server.url) as open_one, RemoteGateway(open_one.url) as gateway:
        session, hidden = gateway.create_session(), open_one.create_session()
        assert gateway.get(session.id).id == session.id
        with pytest.raises(ConfigError, match="nobody sees the sessions of others: start it with one"):
            gateway.list_sessions()
        with pytest.raises(Exception, match="no key was sent"):
            gateway.get(hidden.id)


def test_a_collector_runs_agents_on_it(served: AgentGateway, gateway: RemoteGateway, tokenizer: Any) -> None:
    with AgentCollector(gateway, two_turns(rising), ["a", "b", "c"], group_size=4, groups_per_batch=3) as collector:
        (batch,) = collector
        assert collector.stats()["failed_runs"] == 0
    assert batch.shape == (12,)
    for row in batch.unbind(0):
        assert row["masks", "all_assistant_mask"].sum() == 12
        assert row["text", "full"] == tokenizer.decode(row["tokens", "prompt"]) + tokenizer.decode(
            row["tokens", "response"]
        )


@pytest.mark.parametrize("remote", [False, True])
def test_versions_are_those_of_the_trainers_own_pool(tiny_llama: Path, model: Any, remote: bool) -> None:
    """The gateway has a pool of its own, as in another process: it does not hear of the trainer's updates."""
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server, AgentGateway(server.url, admin_key=KEY) as served:
        trainer = AsyncSGLang.connect(server.url)
        scheme = SGLangWeightSyncScheme(trainer, config=SyncConfig(verify="off", transport="http"))
        gateway = RemoteGateway(served.url, admin_key=KEY) if remote else served
        seen = []
        with AgentCollector(
            gateway,
            two_turns(rising),
            range(40),
            group_size=2,
            groups_per_batch=1,
            ahead=1,
            max_staleness=1,
            weight_sync_schemes={"policy": scheme},
        ) as collector:
            for batch in itertools.islice(collector, 6):
                seen.append((collector.policy_version, batch["generation", "policy_version"].min().item()))
                for _ in range(2 if len(seen) % 2 else 1):
                    collector.update_policy_weights_(model)
            assert collector.policy_version == 9
            assert collector.stats()["policy_version"] == 9
            assert all(now - oldest <= 1 for now, oldest in seen), seen
        assert gateway.weight_version >= seen[-1][1] > 0
        trainer.shutdown()


def test_a_wrong_key_or_address_is_refused_at_once(served: AgentGateway, server: FakeServer) -> None:
    with pytest.raises(ConfigError, match="admin_key of RemoteGateway"):
        RemoteGateway(served.url, admin_key="another")
    with pytest.raises(ConfigError, match="Is it the address of a gateway"):
        RemoteGateway(f"{served.url}/gate", admin_key=KEY)
    with pytest.raises((ConfigError, ProtocolError)):
        RemoteGateway(server.url)
    with pytest.raises(ServerUnreachableError, match="is it running"):
        RemoteGateway("http://127.0.0.1:9")
    for bad, message in (
        ({"url": "host:8000"}, "http://host:8000"),
        ({"url": served.url + "/sessions/s/v1"}, "the address of a session"),
        ({"url": served.url.replace("//", "//me:secret@")}, "only admin_key opens the gateway"),
        ({"url": served.url, "admin_key": "a", "admin_key_file": "b"}, "not both"),
        ({"url": served.url, "timeout_s": 0}, "timeout_s"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            RemoteGateway(**bad)  # type: ignore[arg-type]
        assert "secret" not in str(caught.value)


def test_as_many_sessions_as_may_be_make_it_wait(gateway: RemoteGateway) -> None:
    made = [gateway.create_session() for _ in range(40)]
    with pytest.raises(OverloadedError) as caught:
        gateway.create_session()
    assert caught.value.retry_after_s >= 1
    for session in made:
        gateway.delete(session.id)


def test_calls_wait_for_a_gateway_that_is_restarted(server: FakeServer) -> None:
    first = AgentGateway(server.url, admin_key=KEY).start()
    port, gateway = first.port, RemoteGateway(first.url, admin_key=KEY, unreachable_s=60)
    session = gateway.create_session()
    first.close()
    again: list[AgentGateway] = []

    def restart() -> None:
        time.sleep(0.7)
        again.append(AgentGateway(server.url, admin_key=KEY, port=port).start())

    threading.Thread(target=restart).start()
    assert gateway.create_session().id != session.id
    with pytest.raises(UnknownSessionError):
        gateway.get(session.id)
    again[0].close()
    gateway.close()
    with pytest.raises(ConfigError, match="was closed"):
        gateway.create_session()


@pytest.mark.parametrize("shares", [False, True])
def test_an_adapter_that_the_gateway_does_not_know_of_is_refused(make: Any, tiny_llama: Path, shares: bool) -> None:
    """Else its agents would sample from the model under the adapter, and nobody would notice."""
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    server = make(enable_lora=True)
    trainer = AsyncSGLang.connect(server.url)
    scheme = SGLangWeightSyncScheme(trainer, config=SyncConfig(verify="off", transport="lora"))
    with (
        AgentGateway(trainer if shares else server.url) as gateway,
        AgentCollector(
            gateway,
            two_turns(rising),
            ["a", "b"],
            group_size=2,
            groups_per_batch=1,
            weight_sync_schemes={"policy": scheme},
        ) as collector,
    ):
        batches = iter(collector)
        next(batches)
        if shares:
            collector.update_policy_weights_(model)
            batch = next(batches)
            assert batch["generation", "policy_version"].tolist() == [collector.policy_version] * 2
        else:
            for call in (lambda: collector.update_policy_weights_(model), lambda: next(batches)):
                with pytest.raises(ConfigError, match="its agents would sample without the adapter"):
                    call()
    trainer.shutdown()


def test_all_calls_end_together_when_the_gateway_is_gone(server: FakeServer) -> None:
    gone = AgentGateway(server.url, admin_key=KEY).start()
    gateway = RemoteGateway(gone.url, admin_key=KEY, unreachable_s=2)
    session = gateway.create_session()
    gone.close()

    def timed(call: Any) -> float:
        begun_at = time.monotonic()
        with pytest.raises(ServerUnreachableError, match="is it running"):
            call()
        return time.monotonic() - begun_at

    assert timed(lambda: gateway.get(session.id)) >= 1
    for _ in range(20):  # without the common limit these take 40 seconds
        timed(lambda: gateway.trajectories(session.id))
        timed(lambda: gateway.delete(session.id))
    assert timed(lambda: [gateway.list_sessions()]) < 2
    gateway.close()


def test_a_failure_of_long_ago_does_not_end_the_waiting_for_the_next_one(server: FakeServer) -> None:
    first = AgentGateway(server.url, admin_key=KEY).start()
    port, gateway = first.port, RemoteGateway(first.url, admin_key=KEY, unreachable_s=2)
    session = gateway.create_session()
    first.close()
    with pytest.raises(ServerUnreachableError):
        gateway.delete(session.id)
    time.sleep(2.1)
    again: list[AgentGateway] = []
    starting = threading.Timer(0.7, lambda: again.append(AgentGateway(server.url, admin_key=KEY, port=port).start()))
    starting.start()
    gateway.create_session()
    gateway.close()
    starting.join()
    again[0].close()


def test_closing_it_ends_the_calls_that_wait(server: FakeServer) -> None:
    gone = AgentGateway(server.url, admin_key=KEY).start()
    gateway = RemoteGateway(gone.url, admin_key=KEY, unreachable_s=600)
    gone.close()
    threading.Timer(1.0, gateway.close).start()
    with pytest.raises(ConfigError, match="was closed while a call waited"):
        gateway.create_session()


@pytest.mark.parametrize("status", [429, 503])
def test_calls_wait_for_a_proxy_that_refuses_for_the_moment(served: AgentGateway, status: int) -> None:
    with Ingress(served.url) as ingress, RemoteGateway(ingress.url, admin_key=KEY) as gateway:
        ingress.on("/sessions", answer(status, HTML_502, Retry_After="1"), times=2)
        session = gateway.create_session()
        ingress.on("/sessions", answer(301, Location="https://elsewhere/"))
        with pytest.raises(ConfigError, match="it sends calls on to 'https://elsewhere/'"):
            gateway.create_session()
        gateway.delete(session.id)


def test_a_call_that_never_gets_through_ends_though_others_do(served: AgentGateway) -> None:
    """A proxy may give up on one large answer each time."""
    with Ingress(served.url) as ingress, RemoteGateway(ingress.url, admin_key=KEY, unreachable_s=2) as gateway:
        session = gateway.create_session()
        ingress.on(f"/sessions/{session.id}/trajectories", answer(504, HTML_502))
        failures: list[BaseException] = []

        def read() -> None:
            try:
                gateway.trajectories(session.id)
            except ServerError as error:
                failures.append(error)

        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        deadline = time.monotonic() + 60
        while reading.is_alive() and time.monotonic() < deadline:
            assert gateway.get(session.id).id == session.id
            time.sleep(0.02)
        assert "answered 504" in str(failures[0])
    served.delete(session.id)


def test_the_newest_weights_may_have_a_lower_number(make: Any) -> None:
    """Of a trainer that has begun anew: else all that it samples would be too old."""
    server = make(weight_version="500@old")
    with AgentGateway(server.url, admin_key=KEY) as served:
        assert served.weight_version == 500
        server.set_state(weight_version="3@new")
        session = served.create_session()
        ask(session.base_url, session.api_key, [says("hi")])
        assert served.trajectories(session.id)[0].weight_versions[-1] == 3
        assert served.weight_version == 3
        with RemoteGateway(served.url, admin_key=KEY) as gateway:
            assert gateway.weight_version == 3


def test_the_key_of_a_session_is_not_written_with_it(gateway: RemoteGateway, served: AgentGateway) -> None:
    for made in (gateway.create_session(), served.create_session()):
        assert made.api_key not in repr(made)
        assert made.id in repr(made)
        served.delete(made.id)
