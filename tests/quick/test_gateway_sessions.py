"""Sessions over HTTP: made, read, rewarded and deleted; keys, bodies, and routes that do not exist."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway_stand_in import StandInGateway


@pytest.fixture
def gateway() -> StandInGateway:
    return StandInGateway()


def test_a_session_has_an_address_and_a_key(gateway: StandInGateway) -> None:
    answer = gateway.send("/sessions", {"tags": {"task": "sum"}, "ttl_s": 60}, key=None)
    assert answer.status_code == 201
    assert answer.json() == {"id": "s2", "base_url": "http://localhost/sessions/s2/v1", "api_key": "key-of-s2"}
    assert gateway.sessions.created_with[-1] == {"tags": {"task": "sum"}, "ttl_s": 60}
    assert gateway.send("/sessions", key=None).status_code == 201, "the body may be left out"


def test_the_address_is_the_public_one_where_one_is_given() -> None:
    gateway = StandInGateway(public_url="https://agents.example/gate/")
    assert gateway.send("/sessions", key=None).json()["base_url"] == "https://agents.example/gate/sessions/s2/v1"


def test_a_gateway_with_a_key_makes_sessions_for_its_holders_only() -> None:
    gateway = StandInGateway(admin_key="secret")
    assert gateway.send("/sessions", key=None).status_code == 401
    assert gateway.send("/sessions", key="wrong").status_code == 401
    assert gateway.send("/sessions", key=gateway.session.key).status_code == 401, "a session's key is not enough"
    assert gateway.send("/sessions", key="secret", headers={"host": "10.0.0.7:8000"}).status_code == 201


def test_a_gateway_without_a_key_serves_only_requests_to_this_machine(gateway: StandInGateway) -> None:
    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert gateway.send("/sessions", key=None, headers={"host": host}).status_code == 201
    refused = gateway.send("/sessions", key=None, headers={"host": "evil.example"})
    assert refused.status_code == 403
    assert "evil.example" in refused.json()["error"]["message"]


ROUTES = [
    ("GET", ""),
    ("DELETE", ""),
    ("POST", "/reward"),
    ("GET", "/trajectories"),
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/v1/messages"),
]


@pytest.mark.parametrize(("method", "route"), ROUTES)
def test_every_route_of_a_session_needs_its_key(gateway: StandInGateway, method: str, route: str) -> None:
    other = gateway.sessions.create()
    for key in (None, "wrong", other.key):
        answer = gateway.send(f"/sessions/s1{route}", {} if method == "POST" else None, method=method, key=key)
        assert answer.status_code == 401, answer.text
    missing = gateway.send(f"/sessions/nobody{route}", {} if method == "POST" else None, method=method)
    assert missing.status_code == 404
    assert "nobody" in missing.text
    assert "s1" in gateway.sessions.made


def test_anthropics_header_carries_the_key_too(gateway: StandInGateway) -> None:
    answer = gateway.send("/sessions/s1", method="GET", key=None, headers={"x-api-key": gateway.session.key})
    assert answer.status_code == 200


def test_a_session_is_read_rewarded_and_deleted(gateway: StandInGateway) -> None:
    assert gateway.send("/sessions/s1", method="GET").json()["status"] == "active"
    answer = gateway.send("/sessions/s1/reward", {"reward": 1, "info": {"solved": True}})
    assert answer.json()["reward"] == 1.0
    assert (gateway.session.given_reward, gateway.session.info_given) == (1.0, {"solved": True})
    [leaf] = gateway.send("/sessions/s1/trajectories", method="GET").json()
    assert (leaf["token_ids"], leaf["loss_mask"], leaf["weight_versions"]) == ([1, 2, 3], [0, 1, 1], [-1, 3, 3])
    assert {"log_probs", "finish_reason", "messages", "parent"} <= set(leaf)
    assert gateway.send("/sessions/s1", method="DELETE").json() == {"id": "s1", "deleted": True}
    assert gateway.send("/sessions/s1", method="GET").status_code == 404


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "reward is missing"),
        ({"reward": "1"}, "must be a number"),
        ({"reward": True}, "must be a number"),
        ({"reward": 1, "infos": {}}, "Did you mean 'info'"),
        ({"reward": 1, "info": []}, "must be an object"),
        ([1], "must be a JSON object"),
        (b'{"reward": NaN}', "NaN is no JSON number"),
        (b'{"reward": 1e999}', "must be a number"),
        (b"reward=1", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"info": {"a": "\\ud800"}, "reward": 1}', "surrogate"),
        (b'{"a": ' * 120 + b"1" + b"}" * 120, "nested more than"),
        (b'{"info": ' * 120 + b"1", "not valid JSON"),
        (b"[" * 9000, "nested too deeply"),
        (b"9" * 5000, "not valid JSON"),
    ],
)
def test_a_bad_body_is_refused(gateway: StandInGateway, body: Any, says: str) -> None:
    answer = gateway.send("/sessions/s1/reward", body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert gateway.session.given_reward is None


def test_an_oversized_body_is_refused_whether_or_not_its_length_is_announced(gateway: StandInGateway) -> None:
    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 1000

    large = gateway.send("/sessions/s1/v1/chat/completions", b" " * 20_000)
    chunked = gateway.send("/sessions/s1/v1/chat/completions", None, content=pieces())
    for answer in (large, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert gateway.chat().status_code == 200


def test_a_route_that_does_not_exist_is_named(gateway: StandInGateway) -> None:
    answer = gateway.send("/sessions/s1/v1/embeddings", {})
    assert answer.status_code == 404
    assert "POST /sessions/s1/v1/embeddings" in answer.json()["error"]["message"]
    assert gateway.send("/sessions/s1/v1/chat/completions", method="GET").status_code == 405


def test_errors_of_anthropics_route_have_anthropics_form(gateway: StandInGateway) -> None:
    answer = gateway.send("/sessions/s1/v1/messages", {"model": "m"})
    assert answer.json() == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "max_tokens is missing"},
    }


def test_the_model_is_listed(gateway: StandInGateway) -> None:
    listed = gateway.send("/sessions/s1/v1/models", method="GET").json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert gateway.send("/sessions/s1/v1/models/tiny", method="GET").json()["object"] == "model"
    assert gateway.send("/sessions/s1/v1/models/gpt-4o", method="GET").status_code == 404


def test_health_needs_no_key(gateway: StandInGateway) -> None:
    assert gateway.send("/health", method="GET", key=None).json() == {"status": "ok"}
