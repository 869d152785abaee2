"""Clients that keep a message's tool calls without the text before them, as crewai and Semantic Kernel do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent_kit import chat, check_recorded, says, scripted, user
from tests.matrix.combinations import TOOLS
from tests.matrix.tokenizer_kinds import make_tokenizer
from tests.quick.agent_templates import CALL, QWEN3


@pytest.fixture
def talk() -> Any:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    answers = iter([f"Let me see.\n{CALL}", "It is 5."])
    sessions, model = scripted(tokenizer, lambda _: says(tokenizer, next(answers), "<|im_end|>"))
    session = sessions.create()
    first = chat(session, [user("2 + 3?")], tools=tuple(TOOLS)).choices[0].message
    assert first["content"] == "Let me see."
    return session, first, model


def go_on(session: Any, message: dict[str, Any]) -> list[Any]:
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "5"}
    chat(session, [user("2 + 3?"), message, result], tools=tuple(TOOLS))
    return list(session.trajectories())


@pytest.mark.parametrize("content", [None, "", [], "absent"])
def test_a_call_whose_text_was_left_out_continues_its_trajectory(talk: Any, content: Any) -> None:
    session, first, model = talk
    message = {"role": "assistant", "tool_calls": first["tool_calls"]}
    (whole,) = go_on(session, message if content == "absent" else {**message, "content": content})
    assert [each["content"] for each in whole.messages if each["role"] == "assistant"] == ["Let me see.", "It is 5."]
    check_recorded([whole], model.calls)


def test_another_text_before_the_call_is_another_message(talk: Any) -> None:
    session, first, model = talk
    leaves = go_on(session, {**first, "content": "I was told to add."})
    assert len(leaves) == 2
    check_recorded(leaves, model.calls)


def test_a_call_of_another_id_without_the_text_is_another_message(talk: Any) -> None:
    session, first, _ = talk
    calls = [{**first["tool_calls"][0], "id": "made-up"}]
    assert len(go_on(session, {"role": "assistant", "content": None, "tool_calls": calls})) == 2


def test_calls_of_one_turn_without_their_texts_are_told_apart_by_their_ids() -> None:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    answers = iter([f"One.\n{CALL}", f"Two.\n{CALL}", "It is 5."])
    sessions, model = scripted(tokenizer, lambda _: says(tokenizer, next(answers), "<|im_end|>"))
    session = sessions.create()
    turn = chat(session, [user("2 + 3?")], tools=tuple(TOOLS), sampling={"n": 2})
    leaves = go_on(session, {"role": "assistant", "tool_calls": turn.choices[1].message["tool_calls"]})
    assert len(leaves) == 2
    longest = max(leaves, key=lambda leaf: len(leaf.token_ids))
    assert longest.messages[1]["content"] == turn.choices[1].message["content"] == "Two."
    check_recorded(leaves, model.calls)
