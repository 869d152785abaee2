"""Turns that a proxy, or a full server, refuses for the moment: the gateway waits and sends them again."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.agent_kit import run, told_tokens, user
from tests.fake_sglang import FakeServer
from tests.ingress import HTML_502, Ingress, answer
from tests.quick.test_agents_generation import serving
from torchrl_sglang import RequestRejectedError, ServerError, ServerTimeoutError
from torchrl_sglang.agents import slots
from torchrl_sglang.agents.http.translation import api_error
from torchrl_sglang.agents.sessions import Sessions
from torchrl_sglang.agents.types import ChatRequest

Make = Callable[..., FakeServer]
ASK = ChatRequest(messages=(user("dog"),), sampling={"max_new_tokens": 4, "ignore_eos": True})
FULL = json.dumps({"error": {"message": "The request queue is full."}})


@pytest.fixture
def ingress_of() -> Iterator[Callable[..., Ingress]]:
    with ExitStack() as open_:
        yield lambda server: open_.enter_context(Ingress(server.url))


def turn(sessions: Sessions, *, streams: bool = False) -> Any:
    reports: list[Any] = []
    return run(sessions.create().chat(ASK, reports.append if streams else None))


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    "refusal",
    [
        answer(429, HTML_502, Retry_After="0"),
        answer(429, '{"error": "slow down"}', kind="application/json", Retry_After="0"),
        answer(503, HTML_502, Retry_After="0"),
        answer(503, HTML_502),
        answer(502, HTML_502),
        answer(503, FULL, kind="application/json"),
    ],
    ids=["429", "429 JSON", "503 later", "503", "502", "queue full"],
)
def test_an_agent_notices_nothing_of_a_refusal_for_the_moment(
    make: Make, ingress_of: Callable[..., Ingress], refusal: Any, streams: bool
) -> None:
    ingress = ingress_of(make())
    with serving(ingress) as sessions:
        ingress.seen.clear()
        ingress.on("/generate", refusal, times=1)
        made = turn(sessions, streams=streams)
        assert len(made.choices[0].token_ids) == 4
        assert ingress.seen.count("/generate") == 2
        assert [len(session.trajectories()) for session in sessions] == [1]


def test_it_waits_as_long_as_the_answer_says(make: Make, ingress_of: Callable[..., Ingress]) -> None:
    ingress = ingress_of(make())
    with serving(ingress) as sessions:
        ingress.on("/generate", answer(429, HTML_502, Retry_After="1"), times=1)
        begun_at = time.monotonic()
        turn(sessions)
        assert time.monotonic() - begun_at >= 1


def test_other_servers_get_the_turns_of_one_that_refuses(make: Make, ingress_of: Callable[..., Ingress]) -> None:
    server, ingress = make(), ingress_of(make())
    with serving(ingress, server) as sessions:
        ingress.seen.clear()
        ingress.on("/generate", answer(429, HTML_502, Retry_After="600"))

        async def several() -> list[Any]:
            return list(await asyncio.gather(*[sessions.create().chat(ASK) for _ in range(6)]))

        assert len(run(several())) == 6
        asked = ingress.seen.count("/generate")
        assert 1 <= asked <= 3
        run(several())
        assert ingress.seen.count("/generate") == asked


def test_a_server_behind_a_proxy_that_is_gone_leaves_its_turns_to_others(
    make: Make, ingress_of: Callable[..., Ingress]
) -> None:
    server, ingress = make(), ingress_of(make())
    with serving(ingress, server) as sessions:
        ingress.on("*", answer(503, HTML_502))
        made = [turn(sessions) for _ in range(2)]
        assert all(len(each.choices[0].token_ids) == 4 for each in made)
        assert [client.url for client in sessions.model.pool.healthy] == [server.url]


def test_a_refusal_that_outlasts_the_turn_is_told_at_once(make: Make, ingress_of: Callable[..., Ingress]) -> None:
    ingress = ingress_of(make())
    with serving(ingress, turn_timeout_s=60) as sessions:
        ingress.on("/generate", answer(429, HTML_502, Retry_After="3600"))
        begun_at = time.monotonic()
        with pytest.raises(RequestRejectedError, match="it limits the rate") as caught:
            turn(sessions)
        assert time.monotonic() - begun_at < 50
    told = api_error(caught.value)
    assert (told.status, told.code, told.headers["retry-after"]) == (429, "rate_limit_exceeded", "3600")


def test_later_turns_look_whether_a_long_refusal_is_over(
    make: Make, ingress_of: Callable[..., Ingress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_LONGEST_REFUSAL_S", 0.5)
    ingress = ingress_of(make())
    with serving(ingress, turn_timeout_s=60) as sessions:
        ingress.on("/generate", answer(429, HTML_502, Retry_After="3600"), times=1)
        with pytest.raises(RequestRejectedError, match="it limits the rate"):
            turn(sessions)
        assert len(turn(sessions).choices[0].token_ids) == 4


def test_a_turn_that_is_refused_until_its_time_is_over_says_so(make: Make, ingress_of: Callable[..., Ingress]) -> None:
    ingress = ingress_of(make())
    with serving(ingress, turn_timeout_s=1.0) as sessions:
        ingress.on("/generate", answer(429, HTML_502, Retry_After="0"))
        with pytest.raises(ServerTimeoutError, match="within 1 s.*it limits the rate"):
            turn(sessions)


def test_a_server_that_is_full_for_too_long_is_an_error(make: Make, ingress_of: Callable[..., Ingress]) -> None:
    ingress = ingress_of(make())
    with serving(ingress, no_server_wait_s=0.5) as sessions:
        ingress.on("/generate", answer(503, FULL, kind="application/json"))
        with pytest.raises(ServerError, match="The request queue is full") as caught:
            turn(sessions)
    assert api_error(caught.value).status == 503


@pytest.mark.parametrize("status", [401, 404, 413, 500, 504])
def test_other_refusals_are_told_at_once(make: Make, ingress_of: Callable[..., Ingress], status: int) -> None:
    ingress = ingress_of(make())
    with serving(ingress) as sessions:
        ingress.seen.clear()
        ingress.on("/generate", answer(status, HTML_502))
        with pytest.raises(RequestRejectedError, match=f"answered {status}"):
            turn(sessions)
        assert ingress.seen.count("/generate") == 1


def test_a_stream_that_a_full_server_aborts_before_its_first_token_is_sent_again(
    make: Make, ingress_of: Callable[..., Ingress]
) -> None:
    """With ``--max-queued-requests`` SGLang answers a stream with one event, whose abort has a status."""
    refused = {
        "text": "",
        "output_ids": [],
        "meta_info": {
            "id": "a",
            "finish_reason": {"type": "abort", "status_code": 503, "message": "The request queue is full."},
            "prompt_tokens": 3,
            "completion_tokens": 0,
            "cached_tokens": 0,
            "weight_version": "default",
            "output_token_logprobs": [],
        },
    }
    event = answer(200, f"data: {json.dumps(refused)}\n\ndata: [DONE]\n\n", kind="text/event-stream")
    ingress = ingress_of(make())
    with serving(ingress, no_server_wait_s=30) as sessions:
        ingress.seen.clear()
        ingress.on("/generate", event, times=2)
        begun_at = time.monotonic()
        assert len(turn(sessions, streams=True).choices[0].token_ids) == 4
        assert ingress.seen.count("/generate") == 3
        assert time.monotonic() - begun_at >= 2, "a full server is not asked again at once"
    with serving(ingress, no_server_wait_s=0.5) as sessions:
        ingress.on("/generate", event)
        with pytest.raises(ServerError, match="The request queue is full"):
            turn(sessions, streams=True)


def test_a_stream_that_a_server_ends_for_the_moment_goes_on_from_the_tokens_that_were_told(
    make: Make, ingress_of: Callable[..., Ingress]
) -> None:
    """SGLang ends a response that runs for too long (``SGLANG_REQ_RUNNING_TIMEOUT``) with an abort of status 503."""
    meta = {"id": "a", "prompt_tokens": 3, "cached_tokens": 0, "weight_version": "default"}
    meta |= {"completion_tokens": 2, "output_token_logprobs": [[-0.5, 11, None], [-0.5, 12, None]]}
    ended = {"type": "abort", "status_code": 503, "message": "Request running timeout reached."}
    events = [
        {"text": "", "output_ids": [11, 12], "meta_info": {**meta, "finish_reason": why}} for why in (None, ended)
    ]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    ingress = ingress_of(make())
    with serving(ingress) as sessions:
        ingress.on("/generate", answer(200, f"{text}data: [DONE]\n\n", kind="text/event-stream"), times=1)
        reports: list[Any] = []
        choice = run(sessions.create().chat(ASK, reports.append)).choices[0]
        told = told_tokens(reports)
        assert len(choice.token_ids) == len(choice.log_probs) == 4
        assert told[:2] == (11, 12)
        assert choice.token_ids[: len(told)] == told
