"""A client's messages are recognised as what the session produced, however its JSON round trip wrote them."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest

from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang.agents.conversation.messages import Message, read_messages, same_answer
from torchrl_sglang.agents.conversation.template import AgentTemplate
from torchrl_sglang.agents.conversation.tree import Node, Tree
from torchrl_sglang.errors import ConfigError

OURS = {
    "role": "assistant",
    "content": None,
    "reasoning_content": "add them",
    "tool_calls": [
        {"id": "call1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": [1.5, "ü"]}'}},
        {"id": "call2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ],
}


def call(index: int, **function: Any) -> dict[str, Any]:
    return {"function": {**OURS["tool_calls"][index]["function"], **function}}  # type: ignore[index]


def ours(**changed: Any) -> dict[str, Any]:
    return {**OURS, **changed}


SAME = {
    "as it was": OURS,
    "an empty content": ours(content=""),
    "no parts": ours(content=[]),
    "thinking left out": {key: value for key, value in OURS.items() if key != "reasoning_content"},
    "thinking with white space": ours(reasoning_content="\nadd them\n"),
    "thinking under another name": {**ours(reasoning="add them"), "reasoning_content": None},
    "thinking in the content": {**ours(content="<think>\nadd them\n</think>\n\n"), "reasoning_content": None},
    "thinking as a part": ours(content=[{"type": "thinking", "thinking": "add them"}]),
    "no ids": ours(tool_calls=[call(0), call(1)]),
    "other ids": ours(tool_calls=[{**call(0), "id": "x"}, {**call(1), "id": "y"}]),
    "spaces": ours(tool_calls=[call(0, arguments='{"a":2,\n"b":[1.5,"ü"]}'), call(1)]),
    "escapes": ours(tool_calls=[call(0, arguments='{"a": 2, "b": [1.5, "\\u00fc"]}'), call(1)]),
    "another order": ours(tool_calls=[call(0, arguments='{"b": [1.5, "ü"], "a": 2}'), call(1)]),
    "JavaScript's numbers": ours(tool_calls=[call(0, arguments='{"a": 2.0, "b": [1.5, "ü"]}'), call(1)]),
    "an object": ours(tool_calls=[call(0, arguments={"a": 2, "b": [1.5, "ü"]}), call(1)]),
    "no arguments": ours(tool_calls=[call(0), call(1, arguments="")]),
    "null arguments": ours(tool_calls=[call(0), call(1, arguments=None)]),
    "more fields": ours(refusal=None, annotations=[], audio=None, function_call=None, name=None, index=3),
}
OTHER = {
    "another role": ours(role="user", tool_calls=None, content=""),
    "a content": ours(content="Hm."),
    "other thinking": ours(reasoning_content="add them twice"),
    "a call less": ours(tool_calls=[call(0)]),
    "calls in another order": ours(tool_calls=[call(1), call(0)]),
    "another argument": ours(tool_calls=[call(0, arguments='{"a": 3, "b": [1.5, "ü"]}'), call(1)]),
    "another tool": ours(tool_calls=[call(0, name="sub"), call(1)]),
}


@pytest.mark.parametrize("name", SAME)
def test_an_answer_is_recognised(name: str) -> None:
    message = json.loads(json.dumps(SAME[name]))
    assert same_answer(*read_messages([message]), *read_messages([OURS]))


@pytest.mark.parametrize("name", OTHER)
def test_another_answer_is_not_taken_for_it(name: str) -> None:
    assert not same_answer(*read_messages([OTHER[name]]), *read_messages([OURS]))


def node(answer: Message, *new: Message, parent: Node | None = None, turn: str = "1", index: int = 0) -> Node:
    return Node(
        turn=turn,
        index=index,
        parent=parent,
        base=parent,
        new=new,
        answer=answer,
        prompt_text="",
        prompt_ids=array("q", [1]),
        text=answer.content,
        beyond="",
        output_ids=array("q", [hash((turn, index)) % 1000]),
        log_probs=array("d", [0.0]),
        versions=array("q", [0]),
        finish_reason="stop",
        position=(0 if parent is None else parent.position + 1) + len(new),
    )


def test_results_are_known_by_their_calls_whatever_a_client_calls_these() -> None:
    tree = Tree()
    (question,), (answer,) = read_messages([{"role": "user", "content": "?"}]), read_messages([OURS])
    first = tree.add(node(answer, question))
    results = [
        Message(role="tool", content="4", call_id="call1"),
        Message(role="tool", content="noon", call_id="call2"),
    ]
    second = tree.add(node(Message(role="assistant", content="Done."), *results, parent=first))

    def ask(*ids: str, contents: tuple[str, str] = ("4", "noon")) -> Any:
        message = {**OURS, "tool_calls": [{**call(i), **({"id": ids[i]} if ids else {})} for i in range(2)]}
        told = [
            {"role": "tool", "content": c, **({"tool_call_id": ids[i]} if ids else {})} for i, c in enumerate(contents)
        ]
        talk = [{"role": "user", "content": "?"}, message, *told, {"role": "assistant", "content": "Done."}]
        return tree.match(read_messages([*talk, {"role": "user", "content": "And?"}]))

    for match in (ask("call1", "call2"), ask("x", "y"), ask()):
        assert match.node is second
        assert [message.call_id for message in match.messages[2:4]] == ["call1", "call2"]
        assert [message.content for message in match.new] == ["And?"]
    edited = ask("x", "y", contents=("5", "noon"))
    assert edited.node is first
    assert [message.call_id for message in edited.new[:2]] == ["call1", "call2"]


def test_of_equal_answers_the_one_that_the_conversation_went_on_from_is_taken_then_the_latest() -> None:
    tree = Tree()
    question, yes = Message(role="user", content="?"), Message(role="assistant", content="Yes.")
    nodes = [
        tree.add(node(yes, question, turn=turn, index=index))
        for turn, index in (("1", 0), ("2", 0), ("2", 1), ("3", 0))
    ]
    talk = [question, yes, Message(role="user", content="sure?")]
    assert tree.match(talk).node is nodes[3]
    del nodes[3].children[:]
    later = tree.add(node(yes, talk[2], parent=nodes[0], turn="4"))
    assert tree.match([*talk, yes, question]).node is later


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("text", "must be an object"),
        ({"content": "x"}, "must be an object with 'role'"),
        ({"role": "user", "content": 5}, "must be a string or a list of parts"),
        ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\] must be a part"),
        (
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]},
            "takes text and images alone",
        ),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "an image without a URL"),
        ({"role": "user", "content": "x", "tool_calls": [call(0)]}, "only the assistant calls tools"),
        ({"role": "assistant", "tool_calls": "x"}, "must be a list"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": [call(0, arguments=[1])]}, "must be JSON text"),
    ],
)
def test_a_bad_message_is_refused_with_its_place(message: Any, error: str) -> None:
    with pytest.raises(ConfigError, match=r"messages\[1\].*" + error):
        read_messages([{"role": "user", "content": "x"}, message])


def test_several_system_messages_keep_their_order_and_the_tools_come_last() -> None:
    template = AgentTemplate(make_tokenizer("byte-level BPE", TEMPLATES["ChatML"].source))
    talk = read_messages([{"role": "system", "content": name} for name in "ab"] + [{"role": "user", "content": "c"}])
    assert [message["content"] for message in template.form(talk, []).messages] == ["a", "b", "c"]
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    form = template.form(talk, [tool])
    assert form.messages[0]["content"].startswith("a\n\n# Tools")
    assert ([message["role"] for message in form.messages], form.places) == (["system", "system", "user"], [0, 1, 2])
