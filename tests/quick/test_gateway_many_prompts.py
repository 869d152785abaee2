"""A request of ``/completions`` with several prompts, as LangChain's ``OpenAI.batch`` sends them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.gateway_stand_in import StandInGateway, make_choice, make_turn
from torchrl_sglang.agents.types import TextRequest
from torchrl_sglang.errors import ContextLengthError

# The request of LangChain's OpenAI, trimmed.
LANGCHAIN = {"frequency_penalty": 0, "logprobs": None, "max_tokens": 256, "n": 1, "seed": None, "temperature": 0.7}


@pytest.fixture
def gateway() -> StandInGateway:
    return StandInGateway()


def complete(gateway: StandInGateway, prompt: Any, **fields: Any) -> Any:
    return gateway.send("/sessions/s1/v1/completions", {"model": "m", "prompt": prompt, **fields})


def test_each_prompt_has_its_choice_and_the_usage_is_their_sum(gateway: StandInGateway) -> None:
    gateway.session.answers.extend([make_turn(make_choice(content="one")), make_turn(make_choice(content="two"))])
    reply = complete(gateway, ["Once", "Twice"], **LANGCHAIN)
    answer = reply.json()
    assert reply.headers["x-request-id"] == answer["id"]
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "one"), (1, "two")]
    assert answer["usage"]["prompt_tokens"] == 20
    assert answer["usage"]["total_tokens"] == 24
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}
    assert [request.prompt for request in gateway.session.requests if isinstance(request, TextRequest)] == [
        "Once",
        "Twice",
    ]


def test_with_several_choices_those_of_a_prompt_are_neighbours(gateway: StandInGateway) -> None:
    for first, second in (("a", "b"), ("c", "d")):
        gateway.session.answers.append(make_turn(make_choice(content=first), make_choice(1, content=second)))
    choices = complete(gateway, [[5, 6], [7]], n=2, logprobs=0).json()["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0, 1]] * 4


def test_one_prompt_that_fails_fails_the_request_and_the_others_wait_for_its_retry(gateway: StandInGateway) -> None:
    gateway.session.answers.extend([make_turn(), ContextLengthError("too long")])
    assert complete(gateway, ["Once", "Twice"]).status_code == 400
    assert gateway.session.not_delivered in ([], ["turn-1"])  # finished, or ended, before the other failed
    gateway.session.hang = True
    gateway.session.answers.extend([make_turn(), ContextLengthError("too long")])
    assert complete(gateway, ["Once", "Twice"]).status_code == 400
    assert gateway.session.cancelled == 1


def test_a_client_that_leaves_ends_all_prompts(gateway: StandInGateway) -> None:
    gateway.session.hang = True

    async def leave() -> None:
        async with gateway.client() as client:
            headers = {"authorization": f"Bearer {gateway.session.key}"}
            body = {"model": "m", "prompt": ["Once", "Twice"]}
            request = asyncio.ensure_future(
                client.post("/sessions/s1/v1/completions", json=body, headers=headers, timeout=30)
            )
            while len(gateway.session.requests) < 2:
                await asyncio.sleep(0)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    asyncio.run(leave())
    assert gateway.session.cancelled == 2


def test_an_idempotency_key_names_each_prompt(gateway: StandInGateway) -> None:
    body = {"model": "m", "prompt": ["Once", "Once"]}
    gateway.send("/sessions/s1/v1/completions", body, headers={"idempotency-key": "k"})
    assert [request.idempotency_key for request in gateway.session.requests] == ["k", "k 1"]
