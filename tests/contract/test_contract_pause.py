"""Effects of pause, abort, flush and version changes on requests, on the fake and on the real server."""

from __future__ import annotations

import pytest
import requests

from tests.contract.kit import PROMPT, Background, LongRequest, Subject

PAUSED = {"message": "Generation paused successfully.", "status": "ok"}
CONTINUED = {"message": "Generation continued successfully.", "status": "ok"}
ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
MODES = ["abort", "retract", "in_place"]


@pytest.mark.parametrize("mode", MODES)
def test_requests_to_a_paused_server_wait_until_it_continues(subject: Subject, mode: str) -> None:
    assert subject.get("/ready").status_code == 200
    pause = subject.post("/pause_generation", mode=mode)
    assert (pause.status_code, pause.json()) == (200, PAUSED)

    waiting = Background(subject.generate)
    assert not waiting.is_done(0.5)
    assert subject.get("/ready").status_code == 503
    assert subject.get("/health").status_code == 200, "health without generation only shows that the process runs"
    assert subject.get("/server_info").status_code == 200

    continued = subject.post("/continue_generation")
    assert (continued.status_code, continued.json()) == (200, CONTINUED)
    assert len(waiting.result()["output_ids"]) == 4
    assert subject.get("/ready").status_code == 200


def test_pausing_twice_and_continuing_without_a_pause_are_allowed(subject: Subject) -> None:
    assert subject.post("/continue_generation").status_code == 200
    assert [subject.post("/pause_generation", mode=mode).status_code for mode in ("abort", "abort", "retract")] == [
        200
    ] * 3
    assert [subject.post("/continue_generation").status_code for _ in range(2)] == [200] * 2
    assert len(subject.generate()["output_ids"]) == 4


def test_an_unknown_pause_mode_is_refused_and_pauses_nothing(subject: Subject) -> None:
    reply = subject.post("/pause_generation", mode="nap")

    assert reply.status_code == 400
    assert "Input should be 'abort', 'retract' or 'in_place'" in reply.json()["message"]
    assert subject.get("/ready").status_code == 200


def test_abort_ends_running_requests_and_returns_their_tokens_so_far(subject: Subject) -> None:
    request = LongRequest(subject).running()
    subject.post("/pause_generation", mode="abort")

    end = request.end()
    assert end["meta_info"]["finish_reason"] == ABORTED
    tokens = len(end["output_ids"])
    assert 0 < tokens < 1200
    assert len(end["meta_info"]["output_token_logprobs"]) == tokens
    assert end["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": tokens}]


def test_retracted_requests_continue_later_and_allow_a_flush_meanwhile(subject: Subject) -> None:
    request = LongRequest(subject, tokens=600).running()
    subject.post("/pause_generation", mode="retract")
    assert not request.is_done(0.5)
    assert subject.post("/flush_cache").status_code == 200
    paused_at = request.tokens
    assert not request.is_done(0.3)
    assert request.tokens == paused_at
    subject.post("/continue_generation")

    end = request.end()
    assert end["meta_info"]["finish_reason"] == {"type": "length", "length": 600}
    assert end["meta_info"]["num_retractions"] == 1


def test_requests_paused_in_place_continue_later_and_prevent_a_flush(subject: Subject) -> None:
    request = LongRequest(subject).running()
    subject.post("/pause_generation", mode="in_place")

    flush = subject.post("/flush_cache")
    assert (flush.status_code, flush.text) == (400, "Flush cache failed.\n")
    subject.post("/continue_generation")
    request.running(1)
    request.stop()


def test_an_aborted_retracted_request_returns_its_tokens(subject: Subject) -> None:
    request = LongRequest(subject).running()
    subject.post("/pause_generation", mode="retract")
    abort = subject.post("/abort_request", rid=request.rid)
    assert (abort.status_code, abort.text) == (200, "")

    end = request.end()
    assert end["meta_info"]["finish_reason"] == {"type": "abort", "message": "Abort in waiting queue"}
    tokens = len(end["output_ids"])
    assert tokens > 0
    assert [entry[1] for entry in end["meta_info"]["output_token_logprobs"]] == end["output_ids"]
    assert end["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": tokens}]


def test_a_request_paused_in_place_is_aborted_when_generation_continues(subject: Subject) -> None:
    request = LongRequest(subject).running()
    subject.post("/pause_generation", mode="in_place")
    subject.post("/abort_request", rid=request.rid)
    assert not request.is_done(0.5)
    subject.post("/continue_generation")

    assert request.end()["meta_info"]["finish_reason"] == ABORTED


def test_a_request_that_waits_for_the_end_of_a_pause_cannot_be_aborted(subject: Subject) -> None:
    subject.post("/pause_generation", mode="retract")
    waiting = Background(lambda: subject.generate(rid="waiting"))
    assert not waiting.is_done(0.3)
    assert subject.post("/abort_request", rid="waiting").status_code == 200
    assert subject.post("/abort_request", abort_all=True).status_code == 200
    subject.post("/continue_generation")

    assert waiting.result()["meta_info"]["finish_reason"]["type"] == "length"


def test_abort_matches_whole_request_ids_and_always_returns_200(subject: Subject) -> None:
    request = LongRequest(subject, rid="long-name").running()
    assert [subject.post("/abort_request", **body).status_code for body in ({}, {"rid": "long"}, {"rid": "x"})] == [
        200
    ] * 3
    request.running(1)
    subject.post("/abort_request", rid="long-name")

    assert request.end()["meta_info"]["finish_reason"] == ABORTED


def test_one_prompt_of_a_batch_can_be_aborted(subject: Subject) -> None:
    body = {"max_new_tokens": 1200, "temperature": 0, "ignore_eos": True}
    marker = LongRequest(subject).running()
    batch = Background(lambda: subject.generate([PROMPT, [1, 5]], rid=["first", "second"], sampling=body))
    while not batch.is_done(0.05) and subject.get("/v1/loads").json()["loads"][0]["num_running_reqs"] < 2:
        marker.running(1)
    subject.post("/abort_request", rid="first")

    kinds = [reply["meta_info"]["finish_reason"]["type"] for reply in batch.result()]
    marker.stop()
    assert kinds == ["abort", "length"]


def test_a_flush_is_refused_while_requests_run_and_can_wait_for_them(subject: Subject) -> None:
    request = LongRequest(subject).running()
    refused = subject.post("/flush_cache")
    assert (refused.status_code, refused.text) == (400, "Flush cache failed.\n")
    late = subject.post("/flush_cache?timeout=0.3")
    assert (late.status_code, late.text) == (400, "Timed out waiting for idle state.")
    flush = Background(lambda: subject.post("/flush_cache?timeout=30"))
    request.stop()
    assert flush.result().status_code == 200


def test_a_new_weight_version_splits_the_tokens_of_a_paused_request(subject: Subject) -> None:
    request = LongRequest(subject, tokens=600).running()
    subject.post("/pause_generation", mode="retract")
    named = subject.post("/update_weight_version", new_version="7", abort_all_requests=False)
    assert named.status_code == 200
    assert named.json() == {"success": True, "message": "Weight version updated to 7", "new_version": "7"}
    assert subject.version() == "7"
    subject.post("/continue_generation")

    meta = request.end()["meta_info"]
    (old, new) = meta["weight_versions"]
    assert (old["version"], old["start"], new["version"], new["end"]) == ("default", 0, "7", 600)
    assert old["end"] == new["start"] > 0
    assert meta["weight_version"] == "7"


def test_setting_a_weight_version_aborts_running_requests_by_default(subject: Subject) -> None:
    request = LongRequest(subject).running()
    subject.post("/update_weight_version", new_version="8")

    assert request.end()["meta_info"]["finish_reason"] == ABORTED


def test_model_info_has_the_current_version_and_server_info_the_initial_one(subject: Subject) -> None:
    subject.post("/update_weight_version", new_version="9", abort_all_requests=False)

    assert subject.version() == "9"
    assert subject.get("/server_info").json()["weight_version"] == "default"
    assert subject.generate()["meta_info"]["weight_version"] == "9"


@pytest.mark.parametrize(
    "path", ["/pause_generation", "/continue_generation", "/begin_weight_update", "/end_weight_update"]
)
def test_control_calls_require_a_json_body_and_an_empty_one_is_enough(subject: Subject, path: str) -> None:
    reply = requests.post(subject.url + path, timeout=10)
    assert reply.status_code == 400
    assert "Field required" in reply.json()["message"]
    assert subject.get(path).status_code == 405


def test_an_unknown_path_is_404(subject: Subject) -> None:
    reply = subject.post("/get_load")
    assert (reply.status_code, reply.json()) == (404, {"detail": "Not Found"})
