"""The life of a gateway: its address, its keys, its thread, its end."""

from __future__ import annotations

import gc
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang.agents.gateway import AgentGateway
from torchrl_sglang.agents.settings import SessionSettings
from torchrl_sglang.errors import ConfigError, OverloadedError, SessionFinishedError, UnknownSessionError


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "agent-gateway"]


def test_a_port_in_use_is_an_error_before_anything_starts(fake: FakeServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"can't listen on 127.0.0.1:{port}"):
            AgentGateway(fake.url, port=port)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "10.0.0.1"])
def test_other_machines_are_let_in_only_with_a_key(fake: FakeServer, host: str) -> None:
    with pytest.raises(ConfigError, match="give an admin_key"):
        AgentGateway(fake.url, host=host)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"port": -1}, "port must be"),
    ({"port": "80"}, "port must be"),
    ({"admin_key": " "}, "admin_key must be"),
    ({"public_url": "gateway.example"}, "public_url must begin"),
    ({"max_body_bytes": 0}, "max_body_bytes must be"),
    ({"host": "no such host"}, "can't listen|give an admin_key"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_a_bad_argument_is_refused(fake: FakeServer, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AgentGateway(fake.url, **arguments)


def test_a_gateway_for_other_machines_serves_holders_of_its_key(fake: FakeServer) -> None:
    with AgentGateway(fake.url, host="0.0.0.0", admin_key="secret") as gateway:
        assert gateway.url == f"http://127.0.0.1:{gateway.port}"
        with httpx.Client(base_url=gateway.url, trust_env=False) as http:
            assert http.post("/sessions").status_code == 401
            made = http.post("/sessions", headers={"authorization": "Bearer secret"})
        assert made.json()["base_url"].startswith(gateway.url)


def test_it_ends_with_its_block_and_leaves_the_servers_running(fake: FakeServer) -> None:
    with AgentGateway(fake.url) as gateway:
        assert gateway.is_running
        assert len(threads()) == 1
        url = gateway.url
    assert threads() == []
    assert not gateway.is_running
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)
    with pytest.raises(RuntimeError, match="not running"):
        gateway.create_session()
    gateway.close()
    assert httpx.get(f"{fake.url}/ready", trust_env=False).status_code == 200


def test_a_forgotten_gateway_ends(fake: FakeServer) -> None:
    gateway = AgentGateway(fake.url).start()
    assert len(threads()) == 1
    del gateway
    gc.collect()
    deadline = time.monotonic() + 20
    while threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threads() == []


def test_sessions_are_managed_from_python(fake: FakeServer) -> None:
    with AgentGateway(fake.url, settings=SessionSettings(max_sessions=2)) as gateway:
        session = gateway.create_session(tags={"task": 1})
        assert session.api_key not in str(gateway.get(session.id))
        assert gateway.get(session.id).status == "active"
        gateway.create_session()
        assert len(gateway.list_sessions()) == 2
        with pytest.raises(OverloadedError, match="max_sessions"):
            gateway.create_session()
        assert gateway.reward(session.id, 2).reward == 2.0
        with pytest.raises(SessionFinishedError):
            gateway.reward(session.id, 3)
        gateway.delete(session.id)
        for method in (gateway.get, gateway.trajectories, gateway.delete):
            with pytest.raises(UnknownSessionError):
                method(session.id)


def test_a_silent_session_expires_by_itself(fake: FakeServer) -> None:
    with AgentGateway(fake.url) as gateway:
        session = gateway.create_session(ttl_s=0.2)
        deadline = time.monotonic() + 20
        while gateway.get(session.id).status != "expired":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_waiting_for_the_gateway_in_its_own_event_loop_is_an_error(fake: FakeServer) -> None:
    with AgentGateway(fake.url) as gateway:

        async def in_the_loop() -> None:
            gateway.create_session()

        with pytest.raises(RuntimeError, match="was called in it"):
            gateway._server.call(in_the_loop)
