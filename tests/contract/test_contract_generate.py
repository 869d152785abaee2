"""The contract of ``/generate``, on the fake and on the real server."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests

from tests.contract.kit import PROMPT, Subject

META = {
    "id", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "weight_version", "weight_versions",
    "num_retractions", "e2e_latency",
}  # fmt: skip


def test_a_reply_holds_text_ids_and_the_metadata_that_the_client_reads(subject: Subject) -> None:
    reply = subject.generate(tokens=4)

    assert set(reply) == {"text", "output_ids", "meta_info"}
    assert len(reply["output_ids"]) == 4
    meta = reply["meta_info"]
    assert set(meta) >= META
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert meta["prompt_tokens"] == len(PROMPT)
    assert meta["completion_tokens"] == 4
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 4}]
    assert meta["num_retractions"] == 0
    assert "output_token_logprobs" not in meta


def test_greedy_generation_is_repeatable(subject: Subject) -> None:
    assert subject.generate(tokens=8)["output_ids"] == subject.generate(tokens=8)["output_ids"]


def test_one_prompt_returns_an_object_and_a_list_of_prompts_returns_a_list_in_order(subject: Subject) -> None:
    alone = [subject.generate(prompt)["output_ids"] for prompt in (PROMPT, [1, 5])]

    assert isinstance(subject.generate(PROMPT), dict)
    assert [r["output_ids"] for r in subject.generate([PROMPT, [1, 5]])] == alone
    assert len(subject.generate([PROMPT])) == 1


def test_n_returns_a_flat_prompt_major_list_with_request_ids_made_by_the_server(subject: Subject) -> None:
    replies = subject.generate([PROMPT, [1, 5]], sampling={"n": 2}, rid=["a", "b"])

    assert [r["meta_info"]["prompt_tokens"] for r in replies] == [6, 6, 2, 2]
    assert len({r["meta_info"]["id"] for r in replies} - {"a", "b"}) == 4


def test_request_ids_are_returned(subject: Subject) -> None:
    assert subject.generate(PROMPT, rid="mine")["meta_info"]["id"] == "mine"
    assert [r["meta_info"]["id"] for r in subject.generate([PROMPT, [1, 5]], rid=["x", "y"])] == ["x", "y"]


def test_each_prompt_may_have_its_own_sampling_parameters(subject: Subject) -> None:
    params = [{"max_new_tokens": n, "temperature": 0, "ignore_eos": True} for n in (1, 3)]
    replies = subject.post("/generate", input_ids=[PROMPT, [1, 5]], sampling_params=params).json()

    assert [len(r["output_ids"]) for r in replies] == [1, 3]


def test_output_logprobs_name_their_token_and_are_negative(subject: Subject) -> None:
    reply = subject.generate(tokens=3, return_logprob=True)
    meta = reply["meta_info"]

    assert [entry[1] for entry in meta["output_token_logprobs"]] == reply["output_ids"]
    assert all(entry[0] < 0 and entry[2] is None for entry in meta["output_token_logprobs"])
    assert meta["input_token_logprobs"] == []


def test_there_is_a_prompt_logprob_for_each_token_and_the_first_is_null(subject: Subject) -> None:
    entries = subject.generate(tokens=2, return_logprob=True, logprob_start_len=0)["meta_info"]["input_token_logprobs"]

    assert [entry[1] for entry in entries] == PROMPT
    assert entries[0][0] is None
    assert all(entry[0] < 0 for entry in entries[1:])


def test_scoring_generates_no_token(subject: Subject) -> None:
    reply = subject.generate(tokens=0, return_logprob=True, logprob_start_len=0)

    assert (reply["text"], reply["output_ids"]) == ("", [])
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert reply["meta_info"]["output_token_logprobs"] == []
    assert reply["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 0}]
    assert len(reply["meta_info"]["input_token_logprobs"]) == len(PROMPT)


def test_scores_of_a_response_equal_the_logprobs_of_its_generation(subject: Subject) -> None:
    reply = subject.generate(tokens=5, return_logprob=True)
    generated = [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]

    scored = subject.logprobs(PROMPT + reply["output_ids"])[len(PROMPT) - 1 :]

    assert scored == pytest.approx(generated, abs=1e-4)


def test_a_matched_stop_token_is_in_the_ids_and_has_a_logprob_but_is_not_in_the_text(subject: Subject) -> None:
    free = subject.generate(tokens=6)
    stop = free["output_ids"][2]
    first = free["output_ids"].index(stop) + 1

    reply = subject.generate(tokens=6, sampling={"stop_token_ids": [stop], "ignore_eos": False}, return_logprob=True)

    assert reply["output_ids"] == free["output_ids"][:first]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert len(reply["meta_info"]["output_token_logprobs"]) == first
    assert reply["text"] == subject.generate(tokens=first - 1)["text"]


def test_ignore_eos_also_ignores_stop_token_ids(subject: Subject) -> None:
    free = subject.generate(tokens=6)
    reply = subject.generate(tokens=6, sampling={"stop_token_ids": [free["output_ids"][2]], "ignore_eos": True})

    assert reply["output_ids"] == free["output_ids"]


def test_the_prefix_cache_is_reported(subject: Subject) -> None:
    subject.post("/flush_cache")
    assert subject.generate()["meta_info"]["cached_tokens"] == 0
    assert subject.generate()["meta_info"]["cached_tokens"] == len(PROMPT) - 1


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("unknown sampling parameter", {"sampling_params": {"tempratur": 1}}, "unknown field `tempratur`, expected one of"),
    ("temperature below 0", {"sampling_params": {"temperature": -1}}, "temperature must be a non-negative finite"),
    ("top_p above 1", {"sampling_params": {"top_p": 2}}, "top_p must be in (0, 1], got 2."),
    ("negative length", {"sampling_params": {"max_new_tokens": -1}}, "max_new_tokens must be at least 0, got -1."),
    ("empty prompt", {"input_ids": []}, "input_ids cannot be empty."),
    ("no prompt", {"input_ids": None}, "Either text, input_ids or input_embeds should be provided."),
    ("prompt too long", {"input_ids": [1] * 5000}, "is longer than the model's context length"),
    ("too long with its response", {"sampling_params": {"max_new_tokens": 10**6}}, "exceeds the model's maximum"),
    ("adapter without LoRA", {"lora_path": "x"}, "LoRA adapter 'x' was requested, but LoRA is not enabled"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_an_invalid_request_is_refused(subject: Subject, body: dict[str, Any], words: str) -> None:
    reply = subject.post("/generate", **{"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}} | body)

    assert reply.status_code == 400
    error = reply.json()["error"]
    assert words in (error if isinstance(error, str) else error["message"])


def test_an_unknown_field_outside_the_sampling_parameters_is_ignored(subject: Subject) -> None:
    assert subject.generate(no_such_field=1)["output_ids"] == subject.generate()["output_ids"]


def test_a_body_that_is_not_json_is_refused(subject: Subject) -> None:
    headers = {"content-type": "application/json"}
    reply = requests.post(subject.url + "/generate", data="{", headers=headers, timeout=10)

    assert reply.status_code == 400
    assert reply.json()["object"] == "error"


def events_of(subject: Subject, input_ids: Any) -> list[Any]:
    body = {
        "input_ids": input_ids,
        "stream": True,
        "return_logprob": True,
        "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
    }
    reply = requests.post(subject.url + "/generate", json=body, stream=True, timeout=30)
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix(b"data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]


def test_each_event_of_a_stream_holds_all_tokens_so_far_and_the_last_equals_the_whole_reply(subject: Subject) -> None:
    whole = subject.generate(tokens=4)
    events = events_of(subject, PROMPT)

    for event in events:
        length = len(event["output_ids"])
        assert event["output_ids"] == whole["output_ids"][:length]
        assert len(event["meta_info"]["output_token_logprobs"]) == length
    assert [len(event["output_ids"]) for event in events] == sorted({len(event["output_ids"]) for event in events})
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["output_ids"] == whole["output_ids"]
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
    assert events[-1]["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 4}]


def test_events_of_a_streamed_batch_have_the_index_of_their_prompt(subject: Subject) -> None:
    whole = subject.generate([PROMPT, [1, 5]], tokens=4)
    last = {event["index"]: event for event in events_of(subject, [PROMPT, [1, 5]])}

    assert {i: last[i]["output_ids"] for i in last} == {i: r["output_ids"] for i, r in enumerate(whole)}
