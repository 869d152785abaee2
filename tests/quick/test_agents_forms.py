"""Conversations that a chat template refuses, or leaves a part out of: which form of them it gets instead."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.agent_kit import chat, check_recorded, says, scripted, user
from tests.matrix.combinations import TOOLS
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from tests.quick.agent_templates import QWEN3

GEMMA = TEMPLATES["model role"]
MISTRAL = TEMPLATES["alternating"]
LLAMA = TEMPLATES["headers"]


def system(text: str, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": text}


def assistant(text: str | None, *ids: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    message: dict[str, Any] = {"role": "assistant", "content": text}
    return {**message, "tool_calls": [{**call, "id": each} for each in ids]} if ids else message


def result(call_id: str, text: str = "5") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def sent(source: str, messages: list[dict[str, Any]], *, end: str | None = None, tools: Any = ()) -> str:
    """The prompt that a conversation becomes, as text."""
    tokenizer = make_tokenizer("byte-level BPE", source)
    sessions, model = scripted(tokenizer, lambda _: says(tokenizer, "ok", end or tokenizer.eos_token))
    chat(sessions.create(), messages, tools=tuple(tools))
    bos = tokenizer.bos_token or ""
    return str(tokenizer.decode(list(model.calls[0][0]))).removeprefix(bos)


def gemma(*turns: str) -> str:
    roles = ("user", "model")
    said = [f"<start_of_turn>{roles[i % 2]}\n{text}<end_of_turn>\n" for i, text in enumerate(turns)]
    return "".join(said) + "<start_of_turn>model\n"


ALTERNATING: list[tuple[list[dict[str, Any]], tuple[str, ...]]] = [
    ([user("one"), user("two")], ("one\n\ntwo",)),
    ([system("A"), system("B"), user("one")], ("A\n\nB\n\none",)),
    ([system("A"), user("one"), assistant("x"), system("B"), user("two")], ("A\n\none", "x", "B\n\ntwo")),
    ([user("one"), system("B", "developer")], ("one\n\nB",)),
    ([system("A"), user("one"), assistant("x"), user("two"), system("B")], ("A\n\none", "x", "two\n\nB")),
]


@pytest.mark.parametrize(("messages", "turns"), ALTERNATING)
def test_a_template_with_alternating_roles_gets_them(messages: list[dict[str, Any]], turns: tuple[str, ...]) -> None:
    assert sent(GEMMA.source, messages, end=GEMMA.end) == gemma(*turns)


@pytest.mark.parametrize(("messages", "turns"), ALTERNATING)
def test_a_template_that_refuses_later_system_messages_gets_them_as_users(
    messages: list[dict[str, Any]], turns: tuple[str, ...]
) -> None:
    eos = make_tokenizer("byte-level BPE").eos_token
    written = [f"[INST] {text}[/INST]" if i % 2 == 0 else f" {text}{eos}" for i, text in enumerate(turns)]
    assert sent(MISTRAL.source, messages) == "".join(written)


def test_a_template_that_takes_a_conversation_gets_it_as_it_is() -> None:
    talk = [system("A"), user("one"), user("two"), assistant("x"), system("B"), user("three")]
    turns = [f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in talk]
    assert sent(TEMPLATES["ChatML"].source, talk, end="<|im_end|>") == "".join(turns) + "<|im_start|>assistant\n"


def test_a_tools_result_as_a_user_joins_the_user_who_follows() -> None:
    text = sent(GEMMA.source, [user("one"), assistant("x"), result("a"), user("two")], end=GEMMA.end)
    assert text == gemma("one", "x", "<tool_response>\n5\n</tool_response>\n\ntwo")


@pytest.mark.parametrize("source", [GEMMA.source, MISTRAL.source], ids=["Gemma", "Mistral"])
def test_a_conversation_of_a_system_message_alone_is_not_lost(source: str) -> None:
    assert "Be brief." in sent(source, [system("Be brief.")], end=GEMMA.end if source == GEMMA.source else None)


def test_a_system_message_that_the_template_would_leave_out_goes_to_the_user() -> None:
    text = sent(QWEN3, [user("one"), assistant("x"), system("Be brief."), user("two")], end="<|im_end|>")
    assert text.endswith("<|im_start|>user\nBe brief.\n\ntwo<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["model role", "alternating"])
def test_such_a_conversation_is_one_trajectory(name: str) -> None:
    template = TEMPLATES[name]
    tokenizer = make_tokenizer("byte-level BPE", template.source)
    sessions, model = scripted(tokenizer, lambda _: says(tokenizer, "it is", template.end or tokenizer.eos_token))
    session = sessions.create()
    talk: list[Any] = [system("A"), system("B"), user("one")]
    for more in ([user("two"), system("C")], [system("D"), user("three")], [user("four"), user("five")]):
        talk += [chat(session, talk).choices[0].message, *more]
    chat(session, talk)
    (whole,) = session.trajectories()
    check_recorded([whole], model.calls)
    assert [each["content"] for each in whole.messages if each["role"] == "system"] == ["A", "B", "C", "D"]


# ------------------------------------------------------------------ tool calls


def test_a_template_of_one_call_per_message_gets_one_and_the_tokens_of_all_are_kept() -> None:
    tokenizer = make_tokenizer("byte-level BPE", LLAMA.source)
    calls = "".join(f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": 1}}}}\n</tool_call>' for a in (2, 3))
    answers = [says(tokenizer, text, LLAMA.end) for text in (calls, "It is 5.")]
    sampled = list(answers)
    sessions, model = scripted(tokenizer, lambda _: answers.pop(0))
    session = sessions.create()
    turn = chat(session, [user("2 + 1?")], tools=tuple(TOOLS))
    message = dict(turn.choices[0].message)
    (call,) = message["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": 2, "b": 1}
    chat(session, [user("2 + 1?"), message, result(call["id"])], tools=tuple(TOOLS))
    (whole,) = session.trajectories()
    check_recorded([whole], model.calls)
    assert sum(whole.loss_mask) == sum(len(each.ids) for each in sampled)


def test_ids_of_calls_from_elsewhere_are_written_as_the_template_wants_them() -> None:
    talk = [user("q"), assistant(None, "call_abcdefghijklmnop", "call_2"), result("call_2", "2"), result("call_other")]
    text = sent(MISTRAL.source, talk)
    ids = [part.split('"')[0] for part in text.replace('"call_id": "', '"id": "').split('"id": "')[1:]]
    assert [len(each) for each in ids] == [9] * 4
    assert ids[1] == ids[2]
    assert len(set(ids)) == 3


def test_ids_that_the_template_takes_stay_as_they_are() -> None:
    text = sent(MISTRAL.source, [user("q"), assistant(None, "abcDEF123"), result("abcDEF123")])
    assert text.count('"abcDEF123"') == 2
