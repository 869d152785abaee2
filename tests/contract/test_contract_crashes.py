"""Requests that end an SGLang server or block it, on the fake and on the real one. Slow: each test starts a server."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from typing import Any

import pytest
import requests

from tests.contract.kit import PROMPT, TIMEOUT_S, Background, LongRequest, Subject, hosted_store, join_body

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]  # a start takes minutes on a busy machine

FATAL_PROMPTS: dict[str, Any] = {
    "a token id outside the vocabulary": [1, 320],
    "one such id in a batch": [[1, 2], [1, 10**6]],
    "a negative token id": [1, -1],
    "an empty prompt in a batch": [[1, 2], []],
}


def has_ended(subject: Subject) -> bool:
    try:
        subject.get("/model_info", timeout_s=2)
    except requests.RequestException:
        return True
    return False


def assert_ended(subject: Subject) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not has_ended(subject):
        assert time.monotonic() < deadline, "it still answers"
        time.sleep(0.2)


@pytest.mark.parametrize("input_ids", FATAL_PROMPTS.values(), ids=FATAL_PROMPTS)
def test_some_prompts_end_the_server(start_subject: Callable[..., Subject], input_ids: Any) -> None:
    subject = start_subject()
    with pytest.raises(requests.ConnectionError):
        subject.post("/generate", input_ids=input_ids, sampling_params={"max_new_tokens": 1})
    assert_ended(subject)


def test_a_group_without_a_name_ends_the_server(start_subject: Callable[..., Subject]) -> None:
    subject = start_subject()
    store = hosted_store(2)
    with pytest.raises(requests.ConnectionError):
        subject.post("/init_weights_update_group", **join_body(store, ""))
    assert_ended(subject)


def test_an_abort_pause_during_an_in_place_pause_with_requests_never_returns(
    start_subject: Callable[..., Subject],
) -> None:
    subject = start_subject()
    LongRequest(subject).running()
    subject.post("/pause_generation", mode="in_place")
    stuck = [Background(lambda: subject.post("/pause_generation", mode="abort"))]
    assert not stuck[0].is_done(3)
    stuck.append(Background(lambda: subject.post("/continue_generation")))
    stuck.append(Background(lambda: subject.generate(PROMPT)))

    assert not any(call.is_done(2) for call in stuck)
    assert subject.get("/server_info").status_code == 200
    assert subject.get("/ready").status_code == 503


def test_each_key_opens_its_endpoints(start_subject: Callable[..., Subject]) -> None:
    subject = start_subject(api_key="plain", admin_api_key="admin")

    def status(method: str, path: str, key: str | None) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}
        return requests.request(method, subject.url + path, json=body, headers=headers, timeout=20).status_code

    assert {key: status("POST", "/generate", key) for key in (None, "admin", "plain")} == {
        None: 401, "admin": 401, "plain": 200,
    }  # fmt: skip
    assert {key: status("POST", "/flush_cache", key) for key in (None, "plain", "admin")} == {
        None: 401, "plain": 401, "admin": 200,
    }  # fmt: skip
    assert [status("GET", path, None) for path in ("/ready", "/health")] == [200, 200]
    assert [status("GET", path, None) for path in ("/model_info", "/server_info", "/v1/loads")] == [401] * 3
    assert requests.post(subject.url + "/flush_cache", timeout=20).json() == {"error": "Unauthorized"}


def test_an_idle_connection_is_closed_after_five_seconds(start_subject: Callable[..., Subject]) -> None:
    connection = http.client.HTTPConnection(start_subject().url.removeprefix("http://"), timeout=TIMEOUT_S)
    connection.request("GET", "/ready")
    connection.getresponse().read()
    begun = time.monotonic()
    assert connection.sock.recv(1) == b""
    assert time.monotonic() - begun > 1, "the connection was closed before it was idle"
