"""Answers of one turn that are alike: the one that the client goes on from is told by its ids, and by what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.agent_kit import chat, check_recorded, says, scripted, user
from tests.matrix.combinations import TOOLS
from tests.matrix.tokenizer_kinds import make_tokenizer
from tests.quick.agent_templates import CALL, QWEN3
from tests.scripted_gateway import calls

RUN = {
    "type": "function",
    "function": {
        "name": "run",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "all": {"type": "boolean", "default": False}},
        },
    },
}


def sampled(texts: list[str], template: str = QWEN3, **settings: Any) -> tuple[Any, Any]:
    """A session whose model answers these texts in turn."""
    tokenizer = make_tokenizer("byte-level BPE", template)
    answers = iter(texts)
    sessions, model = scripted(tokenizer, lambda _: says(tokenizer, next(answers), "<|im_end|>"), **settings)
    return sessions.create(), model


def result_of(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "5"}


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_call_without_its_thinking_is_that_of_the_choice_that_has_its_id(chosen: int) -> None:
    session, model = sampled([*(f"<think>\n{n}\n</think>\n\n{CALL}" for n in "abc"), "It is 5."])
    turn = chat(session, [user("2 + 3?")], tools=tuple(TOOLS), sampling={"n": 3})
    message = {name: value for name, value in turn.choices[chosen].message.items() if name != "reasoning_content"}
    chat(session, [user("2 + 3?"), message, result_of(message)], tools=tuple(TOOLS))
    leaves = session.trajectories()
    check_recorded(leaves, model.calls)
    longest = max(leaves, key=lambda leaf: len(leaf.token_ids))
    assert longest.messages[1]["reasoning_content"] == "abc"[chosen]


@pytest.mark.parametrize("on_rewrite", ["branch", "keep"])
@pytest.mark.parametrize("keeps_id", [True, False])
@pytest.mark.parametrize("chosen", [0, 1])
def test_a_call_with_a_default_is_not_taken_for_one_without_it(chosen: int, keeps_id: bool, on_rewrite: str) -> None:
    texts = [calls("run", path="a"), calls("run", path="a", all=False), "Done."]
    session, model = sampled(texts, on_rewrite=on_rewrite)
    turn = chat(session, [user("q")], tools=(RUN,), sampling={"n": 2})
    message = json.loads(json.dumps(turn.choices[chosen].message))
    if not keeps_id:
        message["tool_calls"][0]["id"] = "other"
    chat(session, [user("q"), message, result_of(message)], tools=(RUN,))
    leaves = session.trajectories()
    check_recorded(leaves, model.calls)
    longest = max(leaves, key=lambda leaf: len(leaf.token_ids))
    assert longest.messages[1]["tool_calls"] == turn.choices[chosen].message["tool_calls"]


def test_a_result_of_a_call_without_ids_has_the_id_that_the_call_was_given() -> None:
    template = QWEN3.replace("<tool_response>\n", "<tool_response>\n{{ m.tool_call_id }}: ")
    session, model = sampled([CALL, "It is 5."], template)
    message = json.loads(json.dumps(chat(session, [user("2 + 3?")], tools=tuple(TOOLS)).choices[0].message))
    given = message["tool_calls"][0].pop("id")
    talk = [user("2 + 3?"), message, {"role": "tool", "content": "5"}]
    chat(session, talk, tools=tuple(TOOLS))
    (whole,) = session.trajectories()
    check_recorded([whole], model.calls)
    assert whole.messages[2]["tool_call_id"] == given
    assert f"{given}: 5" in session._model.template.decode(whole.token_ids)
