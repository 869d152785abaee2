"""Weight updates over a process group, in valid and invalid orders, on the fake and on the real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.kit import NORM, Background, LongRequest, Subject, Trainer, refused, session, weights_of

OK = {"success": True, "message": "Succeeded to update parameter online."}
NO_SESSION = "update_weights_from_distributed must run between begin_weight_update() and end_weight_update()"
PARTIALLY_UPDATED = "The full weights of the ModelRunner are partially updated. Please discard the whole weights."


# ----------------------------------------------------------------------------------------------------- invalid orders


def test_a_session_is_begun_once_and_ended_once(subject: Subject) -> None:
    assert refused(subject.post("/end_weight_update")) == (
        "no weight-update session is open; call begin_weight_update() first"
    )
    begun = subject.post("/begin_weight_update")
    assert (begun.status_code, begun.json()) == (200, {"success": True, "message": "Success"})
    assert refused(subject.post("/begin_weight_update")) == (
        "a weight-update session is already open; call end_weight_update() first"
    )
    assert subject.post("/end_weight_update").json() == {"success": True, "message": "Success"}
    assert subject.post("/end_weight_update").status_code == 400


def test_an_update_without_a_session_is_refused_before_the_group_is_checked(subject: Subject) -> None:
    body = {"names": [NORM], "dtypes": ["float32"], "shapes": [[64]], "group_name": "nobody"}
    assert refused(subject.post("/update_weights_from_distributed", **body)) == NO_SESSION


def test_an_update_over_a_group_it_does_not_have_is_refused(subject: Subject) -> None:
    body = {"names": [NORM], "dtypes": ["float32"], "shapes": [[64]], "group_name": "nobody"}
    with session(subject):
        message = refused(subject.post("/update_weights_from_distributed", **body))
    assert message.startswith("Failed to receive weights: Group nobody not in [")
    assert refused(subject.post("/destroy_weights_update_group", group_name="nobody")) == (
        "The group to be destroyed does not exist."
    )


def test_requests_are_answered_while_a_session_is_open(subject: Subject) -> None:
    with session(subject):
        assert len(subject.generate()["output_ids"]) == 4


def test_begin_without_a_pause_waits_for_running_requests(subject: Subject) -> None:
    request = LongRequest(subject).running()
    begin = Background(lambda: subject.post("/begin_weight_update"))
    assert not begin.is_done(0.3)
    assert not request.is_done()
    request.stop()
    assert begin.result().status_code == 200
    assert subject.post("/end_weight_update").status_code == 200


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_during_a_pause_a_session_opens_at_once_although_requests_are_unfinished(subject: Subject, mode: str) -> None:
    request = LongRequest(subject).running()
    subject.post("/pause_generation", mode=mode)
    with session(subject):
        assert not request.is_done()
    subject.post("/continue_generation")
    request.stop()


# ------------------------------------------------------------------------------------------------------ valid updates


@pytest.mark.parametrize("flattened", [True, False], ids=["flattened", "tensor by tensor"])
def test_a_full_update_changes_replies_and_checksums(subject: Subject, tiny_llama_b: Path, flattened: bool) -> None:
    before, checksums = subject.generate(tokens=8)["output_ids"], subject.checksums()
    trainer = Trainer(subject)
    with session(subject):
        reply = trainer.update(weights_of(tiny_llama_b), flattened=flattened, weight_version="b")
    trainer.leave()

    assert (reply.status_code, reply.json()["message"]) == (200, f"{OK['message']} Weight version updated to b.")
    assert subject.version() == "b"
    after = subject.generate(tokens=8)
    assert after["output_ids"] != before
    assert after["meta_info"]["weight_versions"] == [{"version": "b", "start": 0, "end": 8}]
    changed = subject.checksums()
    assert changed.keys() == checksums.keys()
    assert changed != checksums

    disk = subject.post("/update_weights_from_disk", model_path=str(tiny_llama_b), weight_version="b on disk")
    assert disk.json()["message"] == "Succeeded to update model weights. Weight version updated to b on disk."
    assert subject.checksums() == changed, "the same weights by another transport"
    assert subject.generate(tokens=8)["output_ids"] == after["output_ids"]


def test_buckets_arrive_one_by_one_and_the_version_changes_only_when_it_is_set(
    subject: Subject, tiny_llama_b: Path
) -> None:
    new = weights_of(tiny_llama_b)
    trainer = Trainer(subject)
    with session(subject):
        for name in sorted(new):
            assert trainer.update({name: new[name]}, flush_cache=False).json() == OK
            assert subject.version() == "default"
    trainer.leave()
    changed = subject.checksums()
    subject.post("/update_weights_from_disk", model_path=str(tiny_llama_b))
    assert subject.checksums() == changed


def test_unknown_tensor_names_are_ignored_with_status_200(subject: Subject) -> None:
    checksums = subject.checksums()
    trainer = Trainer(subject)
    with session(subject):
        assert trainer.update({"no.such.tensor": torch.ones(3)}).json() == OK
    trainer.leave()
    assert subject.checksums() == checksums


def test_other_dtypes_are_cast(subject: Subject) -> None:
    trainer = Trainer(subject)
    halves = {NORM: torch.full((64,), 1.5, dtype=torch.bfloat16)}
    with session(subject):
        assert trainer.update(halves).json() == OK
        as_bf16 = subject.checksums()
        assert trainer.update({NORM: halves[NORM].float()}).json() == OK
    trainer.leave()
    assert subject.checksums() == as_bf16


def test_a_session_closed_early_leaves_mixed_weights_under_the_old_version(
    subject: Subject, tiny_llama_b: Path
) -> None:
    checksums = subject.checksums()
    trainer = Trainer(subject)
    with session(subject):
        trainer.update({NORM: torch.full((64,), 2.0)})
    trainer.leave()

    after = subject.checksums()
    assert {name for name in after if after[name] != checksums[name]} == {NORM}
    assert subject.version() == "default"


def test_without_a_flush_cached_prefixes_are_those_of_the_old_weights(subject: Subject, tiny_llama_b: Path) -> None:
    prompt = list(range(3, 60))
    subject.generate(prompt, tokens=1)
    trainer = Trainer(subject)
    with session(subject):
        trainer.update(weights_of(tiny_llama_b), flush_cache=False)
    trainer.leave()

    def first_logprob() -> tuple[float, int]:
        meta = subject.generate(prompt, tokens=1, return_logprob=True)["meta_info"]
        return meta["output_token_logprobs"][0][0], meta["cached_tokens"]

    stale, cached = first_logprob()
    assert cached == len(prompt) - 1
    assert subject.post("/flush_cache").status_code == 200
    fresh, cached = first_logprob()
    assert cached == 0
    assert abs(stale - fresh) > 1e-3


# ---------------------------------------------------------------------------------------------------- invalid updates


def test_a_wrong_shape_is_refused_after_the_tensors_before_it_were_loaded(subject: Subject) -> None:
    checksums = subject.checksums()
    trainer = Trainer(subject)
    embedding = weights_of(subject.model)["lm_head.weight"] + 1
    with session(subject):
        message = refused(trainer.update({"lm_head.weight": embedding, NORM: torch.ones(3)}, weight_version="never"))
        assert message.startswith("Failed to update parameter online: Attempted to load weight (torch.Size([3]))")
        assert message.endswith(PARTIALLY_UPDATED)
        assert trainer.update({NORM: torch.ones(64)}).json() == OK, "session and group still work"
    trainer.leave()
    assert subject.checksums()["lm_head.weight"] != checksums["lm_head.weight"]
    assert subject.version() == "default"


BAD_ANNOUNCEMENTS: list[tuple[str, dict[str, Any], str]] = [
    (
        "unaligned",
        {"names": ["a", "b"], "dtypes": ["bfloat16", "float32"], "shapes": [[3], [2]]},
        "Unaligned received tensor b: byte offset 6, dtype torch.float32",
    ),
    ("negative", {"names": ["a"], "dtypes": ["float32"], "shapes": [[-3]]}, "Negative dimension in received tensor a"),
    ("empty", {"names": [], "dtypes": [], "shapes": []}, "Cannot create empty tensor bucket"),
    ("lengths", {"names": ["a"], "dtypes": ["float32"] * 2, "shapes": [[3]]}, "zip() argument 2 is longer than"),
    ("dtype", {"names": ["a"], "dtypes": ["torch.float32"], "shapes": [[3]]}, "has no attribute 'torch.float32'"),
]


@pytest.mark.parametrize(
    ("body", "words"), [row[1:] for row in BAD_ANNOUNCEMENTS], ids=[row[0] for row in BAD_ANNOUNCEMENTS]
)
def test_a_bad_announcement_is_refused_before_the_broadcast_is_joined(
    subject: Subject, body: dict[str, Any], words: str
) -> None:
    trainer = Trainer(subject)
    more = {"group_name": trainer.group, "load_format": "flattened_bucket"}
    with session(subject):
        message = refused(subject.post("/update_weights_from_distributed", **body | more))
        assert message.startswith("Failed to receive weights: ")
        assert words in message
        assert trainer.update({NORM: torch.ones(64)}).json() == OK
    trainer.leave()


def test_a_refused_flush_fails_the_call_although_the_weights_were_loaded(subject: Subject) -> None:
    checksums = subject.checksums()
    request = LongRequest(subject).running()
    subject.post("/pause_generation", mode="in_place")
    trainer = Trainer(subject)
    with session(subject):
        message = refused(trainer.update({NORM: torch.full((64,), 2.0)}, weight_version="loaded"))
    trainer.leave()
    assert message == (
        "Weights were updated, but the cache was not flushed because requests are still running or queued. "
        "Retract or finish them, then call /flush_cache."
    )
    assert subject.checksums()[NORM] != checksums[NORM]
    assert subject.version() == "default", "the HTTP frontend keeps the old version"
    subject.post("/continue_generation")
    request.running(3)
    request.stop()
    assert [span["version"] for span in request.end()["meta_info"]["weight_versions"]] == ["default", "loaded"]


def test_a_broadcast_of_fewer_bytes_than_announced_is_not_detected(subject: Subject) -> None:
    trainer = Trainer(subject)
    with session(subject):
        announced = trainer.announce({NORM: torch.ones(64)})
        trainer.broadcast({NORM: torch.ones(32)})
        assert announced.result().json() == OK
    trainer.leave()
