"""Faults of the fake server take effect at the request and the point they were armed for, and nowhere else."""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from tests.contract.kit import (
    NORM,
    PROMPT,
    Background,
    Trainer,
    hosted_store,
    join_body,
    session,
    subject_is_stuck,
    subject_of,
)
from tests.fake_sglang import FakeServer, FakeSettings, Fault
from tests.fake_sglang.faults import FaultRegistry

UPDATE = "/update_weights_from_distributed"
BUCKET = {NORM: torch.full((64,), 2.0)}


# --------------------------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize(
    ("fault", "matching"),
    [
        (Fault(path="/a", action="drop"), [1]),
        (Fault(path="/a", action="drop", nth=3), [3]),
        (Fault(path="/a", action="drop", nth=2, times=2), [2, 3]),
        (Fault(path="/*", action="drop", nth=4, times=0), [4, 5]),
        (Fault(path="/b", action="drop"), []),
    ],
    ids=["the first request", "the third", "two in a row", "from the fourth on", "another path"],
)
def test_a_fault_applies_to_the_requests_it_was_armed_for(fault: Fault, matching: list[int]) -> None:
    registry = FaultRegistry((fault,))
    assert [i for i in range(1, 6) if registry.match("/a")] == matching


def test_a_fault_counts_requests_from_the_moment_it_was_armed() -> None:
    registry = FaultRegistry()
    assert not registry.match("/a")
    registry.arm(Fault(path="/a", action="drop"))
    assert registry.match("/a")
    assert not registry.match("/a")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"path": "/a", "action": "explode"}, "action must be one of"),
        ({"path": "/a", "action": "drop", "at": "lunch"}, "at must be one of"),
        ({"path": "/a", "action": "drop", "nth": 0}, "nth starts at 1"),
        ({"path": "/a", "action": "drop", "when": "now"}, "a fault has no when"),
        ({"path": "/a", "action": "refuse", "at": "replied"}, "comes too late"),
        ({"path": "/a", "action": "drop", "at": "joined"}, "is done at the connection"),
    ],
)
def test_an_invalid_fault_is_refused(fake: FakeServer, record: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Fault.from_json(record)
    reply = requests.post(fake.url + "/fake/faults", json=[record], timeout=5)
    assert (reply.status_code, words in reply.json()["error"]) == (400, True)


def test_faults_are_armed_and_disarmed_over_http(fake: FakeServer) -> None:
    fault = Fault(path="/ready", action="refuse", status=418, message="teapot", times=0)
    armed = requests.post(fake.url + "/fake/faults", json=[fault.to_json()], timeout=5).json()
    assert armed == [fault.to_json()]
    reply = subject_of(fake).get("/ready")
    assert (reply.status_code, reply.json()) == (418, {"success": False, "message": "teapot"})
    assert requests.delete(fake.url + "/fake/faults", timeout=5).json() == []
    assert subject_of(fake).get("/ready").status_code == 200


# ------------------------------------------------------------------------------------------------- at the connection


def test_a_refusal_on_arrival_has_no_effect_and_one_after_handling_has_the_full_effect(fake: FakeServer) -> None:
    subject = subject_of(fake)
    fake.arm(Fault(path="/begin_weight_update", action="refuse"))
    assert subject.post("/begin_weight_update").status_code == 400
    fake.arm(Fault(path="/begin_weight_update", action="refuse", at="handled", status=503))
    assert subject.post("/begin_weight_update").status_code == 503
    assert subject.post("/end_weight_update").status_code == 200


@pytest.mark.parametrize("at", ["arrived", "handled"])
def test_a_dropped_request_gets_no_reply(fake: FakeServer, at: Any) -> None:
    fake.arm(Fault(path="/begin_weight_update", action="drop", at=at))
    with pytest.raises(requests.ConnectionError):
        subject_of(fake).post("/begin_weight_update")
    assert subject_of(fake).post("/end_weight_update").status_code == (200 if at == "handled" else 400)


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_reply_breaks_off(fake: FakeServer, stream: bool) -> None:
    fake.arm(Fault(path="/generate", action="half_reply"))
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        subject_of(fake).post("/generate", input_ids=PROMPT, stream=stream)


def test_a_connection_closed_after_a_reply_breaks_the_next_request_on_it(fake: FakeServer) -> None:
    fake.arm(Fault(path="/ready", action="close"))
    connection = http.client.HTTPConnection(fake.url.removeprefix("http://"), timeout=10)
    connection.request("GET", "/ready")
    reply = connection.getresponse()
    reply.read()
    assert (reply.status, reply.getheader("connection"), reply.will_close) == (200, None, False)
    connection.request("GET", "/ready")
    with pytest.raises(ConnectionError):
        connection.getresponse()
    assert len(fake.events) == 1


def test_a_slow_reply_does_not_delay_others(fake: FakeServer) -> None:
    fake.arm(Fault(path="/server_info", action="slow", seconds=0.8))
    slow = Background(lambda: subject_of(fake).get("/server_info"))
    assert not slow.is_done(0.3)
    assert subject_of(fake).get("/server_info").status_code == 200
    assert not slow.is_done()
    assert slow.result().status_code == 200


def test_a_request_that_hangs_in_the_scheduler_blocks_the_server_and_elsewhere_only_itself(fake: FakeServer) -> None:
    subject = subject_of(fake)
    fake.arm(Fault(path="/flush_cache", action="hang"))
    alone = Background(lambda: subject.post("/flush_cache"))
    assert not alone.is_done(0.3)
    assert not subject_is_stuck(subject)
    fake.arm(Fault(path="/flush_cache", action="hang", at="scheduled"))
    other = Background(lambda: subject.post("/flush_cache"))
    assert not other.is_done(0.3)
    assert subject_is_stuck(subject)
    assert subject.get("/ready").status_code == 200


def test_a_frozen_server_accepts_connections_and_answers_none(fake: FakeServer) -> None:
    fake.arm(Fault(path="/flush_cache", action="freeze"))
    flush = Background(lambda: subject_of(fake).post("/flush_cache"))
    assert not flush.is_done(0.3)
    for path in ("/ready", "/model_info"):
        with pytest.raises(requests.ReadTimeout):
            subject_of(fake).get(path, timeout_s=0.3)


def test_a_server_killed_in_this_process_breaks_its_connections_and_refuses_new_ones(fake: FakeServer) -> None:
    subject = subject_of(fake)
    generating = Background(lambda: subject.generate(tokens=2000))
    assert not generating.is_done(0.3)
    fake.arm(Fault(path="/ready", action="die"))
    with pytest.raises(requests.ConnectionError):
        subject.get("/ready")
    with pytest.raises(requests.ConnectionError):
        generating.result()
    with pytest.raises(requests.ConnectionError):
        subject.get("/ready")


def test_idle_connections_are_closed(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama, keep_alive_s=0.3)) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        connection.request("GET", "/ready")
        connection.getresponse().read()
        assert connection.sock.recv(1) == b""


# -------------------------------------------------------------------------------------------------- in a weight update


def test_an_update_refused_after_joining_changes_no_weights(fake: FakeServer) -> None:
    subject = subject_of(fake)
    trainer = Trainer(subject)
    for at in ("joined", "received"):
        fake.arm(Fault(path=UPDATE, action="refuse", at=at, message=f"refused {at}"))
        with session(subject):
            reply = trainer.update(BUCKET)
        assert (reply.status_code, reply.json()["message"]) == (400, f"refused {at}")
    assert torch.equal(fake.weights[0][NORM], torch.ones(64))
    with session(subject):
        assert trainer.update(BUCKET).status_code == 200
    assert torch.equal(fake.weights[0][NORM], BUCKET[NORM])
    trainer.leave()


def test_a_group_can_be_reported_as_formed_without_being_formed(fake: FakeServer) -> None:
    subject = subject_of(fake)
    fake.arm(Fault(path="/init_weights_update_group", action="no_communicator"))
    store = hosted_store(2)
    reply = subject.post("/init_weights_update_group", **join_body(store, "never"))
    assert (reply.status_code, reply.json()["success"]) == (200, True)
    subject.post("/begin_weight_update")
    body = {"names": [NORM], "dtypes": ["float32"], "shapes": [[64]], "group_name": "never"}
    announced = Background(lambda: subject.post(UPDATE, **body))
    assert not announced.is_done(0.5)
    assert subject_is_stuck(subject)
