"""Forming, using and losing a weight-update group, on the fake and on the real server."""

from __future__ import annotations

import time
import uuid

import pytest
import requests
import torch

from tests.contract.kit import (
    NORM,
    PROMPT,
    TIMEOUT_S,
    Background,
    Subject,
    Trainer,
    announce_until_stuck,
    hosted_store,
    join_body,
    refused,
    session,
    subject_is_stuck,
    trainer_that_dies,
)

OK = {"success": True, "message": "Succeeded to update parameter online."}


def test_a_group_is_formed_and_left(subject: Subject) -> None:
    trainer = Trainer(subject)
    assert trainer.reply.json() == {"success": True, "message": "Succeeded to initialize custom process group."}
    assert trainer.leave().json() == {"success": True, "message": "Succeeded to destroy custom process group."}
    assert trainer.leave().status_code == 400


def test_a_group_name_in_use_is_refused_once_the_store_answers(subject: Subject) -> None:
    trainer = Trainer(subject)
    other_store = hosted_store(2)
    reply = subject.post("/init_weights_update_group", **join_body(other_store, trainer.group))
    assert refused(reply) == (
        "Failed to initialize custom process group: "
        "The specified group name has already been created, please use a different group name."
    )
    trainer.leave()
    again = Trainer(subject, group=trainer.group)
    assert again.reply.status_code == 200
    again.leave()


def test_a_store_that_is_not_hosted_yet_blocks_the_server_until_it_is(subject: Subject) -> None:
    store = hosted_store(2)
    body = join_body(store, f"group-{uuid.uuid4().hex[:8]}")
    del store  # closes its port
    joining = Background(lambda: subject.post("/init_weights_update_group", **body))
    while not subject_is_stuck(subject):
        assert not joining.is_done()

    trainer = Trainer(subject, group=body["group_name"], port=body["master_port"], announced=joining)
    assert trainer.reply.status_code == 200
    trainer.leave()


@pytest.mark.parametrize("field", ["master_address", "master_port", "rank_offset", "world_size"])
def test_forming_a_group_requires_the_address_and_the_ranks(subject: Subject, field: str) -> None:
    body = join_body(hosted_store(2), "incomplete")
    del body[field]
    reply = subject.post("/init_weights_update_group", **body)
    assert reply.status_code == 400
    assert "Field required" in reply.json()["message"]
    assert field in reply.json()["message"]


def test_during_a_broadcast_the_http_frontend_answers_and_scheduler_calls_queue_up(subject: Subject) -> None:
    trainer = Trainer(subject)
    assert subject.post("/begin_weight_update").status_code == 200
    new = {NORM: torch.full((64,), 2.0)}
    announced = announce_until_stuck(trainer, new)

    assert [subject.get(path).status_code for path in ("/health", "/ready", "/model_info", "/v1/loads")] == [200] * 4
    assert subject.post("/abort_request", abort_all=True).status_code == 200
    queued = [
        Background(lambda: subject.post("/update_weight_version", new_version="queued", abort_all_requests=False)),
        Background(lambda: subject.post("/begin_weight_update")),
        Background(lambda: subject.post("/flush_cache")),
        Background(subject.generate),
    ]
    assert not any(call.is_done(0.2) for call in queued)
    trainer.broadcast(new)

    assert announced.result().json() == OK
    assert [call.result().status_code for call in queued[:3]] == [200, 400, 200]
    assert subject.post("/end_weight_update").status_code == 200
    assert len(queued[3].result()["output_ids"]) == 4
    trainer.leave()


def test_a_call_whose_client_gave_up_still_happens(subject: Subject) -> None:
    trainer = Trainer(subject)
    assert subject.post("/begin_weight_update").status_code == 200
    new = {NORM: torch.full((64,), 2.0)}
    announced = announce_until_stuck(trainer, new)
    with pytest.raises(requests.Timeout):
        subject.post("/update_weight_version", new_version="late", abort_all_requests=False, timeout_s=0.5)
    trainer.broadcast(new)
    announced.result()

    deadline = time.monotonic() + TIMEOUT_S
    while subject.version() != "late":
        assert time.monotonic() < deadline, "the abandoned call has not run"
    assert subject.post("/end_weight_update").status_code == 200
    trainer.leave()


@pytest.mark.parametrize("when", ["joined", "announced"])
def test_when_the_trainer_dies_the_update_is_refused_and_the_session_stays_open(subject: Subject, when: str) -> None:
    group = f"dying-{uuid.uuid4().hex[:8]}"
    checksums = subject.checksums()
    assert subject.post("/begin_weight_update").status_code == 200
    trainer_that_dies(subject, group, when)

    body = {"names": [NORM], "dtypes": ["float32"], "shapes": [[64]], "group_name": group}
    message = refused(subject.post("/update_weights_from_distributed", **body, load_format="flattened_bucket"))
    assert message.startswith("Failed to receive weights: ")
    assert "Connection closed by peer" in message
    assert "already open" in refused(subject.post("/begin_weight_update"))
    assert subject.post("/end_weight_update").status_code == 200
    assert subject.post("/destroy_weights_update_group", group_name=group).status_code == 200
    assert subject.checksums() == checksums
    assert len(subject.generate(PROMPT)["output_ids"]) == 4

    trainer = Trainer(subject, group=group)
    with session(subject):
        assert trainer.update({NORM: torch.full((64,), 2.0)}).json() == OK
    trainer.leave()
