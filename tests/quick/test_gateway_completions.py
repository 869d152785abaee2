"""``/completions`` over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway_stand_in import StandInGateway, make_choice, make_turn
from torchrl_sglang.agents.types import TextRequest, TokenLogProb


@pytest.fixture
def gateway() -> StandInGateway:
    return StandInGateway()


def complete(gateway: StandInGateway, **fields: Any) -> Any:
    return gateway.send("/sessions/s1/v1/completions", {"model": "m", "prompt": "Once", **fields})


@pytest.mark.parametrize("prompt", ["Once", ["Once"], [5, 6], [[5, 6]]])
def test_a_prompt_is_text_or_token_ids(gateway: StandInGateway, prompt: Any) -> None:
    body = complete(gateway, prompt=prompt).json()
    request = gateway.session.requests[-1]
    assert request == TextRequest(prompt="Once" if "Once" in prompt else (5, 6), sampling={"max_new_tokens": 16})
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "Hello there", "logprobs": None, "finish_reason": "stop"}]


@pytest.mark.parametrize(
    ("prompt", "adds", "status"), [("a", True, 200), ("a", False, 400), ([5], True, 200), ([5], False, 200)]
)
def test_special_tokens_of_the_tokenizer_stand_before_a_text_and_not_before_token_ids(
    gateway: StandInGateway, prompt: Any, adds: bool, status: int
) -> None:
    assert complete(gateway, prompt=prompt, add_special_tokens=adds).status_code == status


def test_log_probs_have_the_old_form(gateway: StandInGateway) -> None:
    top = ((TokenLogProb(token_id=72, text="H", log_prob=-0.1),), (TokenLogProb(token_id=33, text="!", log_prob=-1.0),))
    gateway.session.answers.append(make_turn(make_choice(top=top)))
    assert complete(gateway, logprobs=1).json()["choices"][0]["logprobs"] == {
        "tokens": ["H", "i"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"H": -0.1}, {"!": -1.0}],
        "text_offset": [0, 1],
    }


def test_the_pieces_of_a_stream_joined_are_the_text(gateway: StandInGateway) -> None:
    gateway.session.answers.append(make_turn(make_choice(ids=(72, 105, 33))))
    text = complete(gateway, stream=True, logprobs=0, stream_options={"include_usage": True}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == "Hello there"
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == ["H", "i", "!"]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 1, 2]
    assert choices[-1]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["total_tokens"] == 13
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"], "stream": True}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
    ],
)
def test_what_cannot_be_honoured_is_refused(gateway: StandInGateway, fields: dict[str, Any], param: str) -> None:
    answer = complete(gateway, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not gateway.session.requests
