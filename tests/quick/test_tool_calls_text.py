"""Tool calls in the text of a response: what is a call, what is not, and the types of its arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_sglang.chat.response import ToolCall
from torchrl_sglang.chat.tool_arguments import Untyped, fit_arguments
from torchrl_sglang.chat.tool_calls import find_tool_calls, read_tool_calls
from torchrl_sglang.chat.tool_json import read_json

WRITE = {"type": "object", "properties": {"text": {"type": "string"}, "times": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": "write", "parameters": WRITE}},
    {"type": "function", "function": {"name": "now"}},
]
NOW = '{"name": "now", "arguments": {}}'


def write(text: str) -> tuple[ToolCall, ...]:
    return (ToolCall(name="write", arguments={"text": text}),)


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines",
        "a\ttab",
        "a </tool_call> b",
        "<tool_call>",
        "</think>",
        "[TOOL_CALLS]",
        "</function>",
        "```\nx\n```",
    ],
)
@pytest.mark.parametrize(
    "form",
    [
        '<tool_call>\n{"name": "write", "arguments": {"text": "%s"}}\n</tool_call>',
        '<tool_call>{"name": "write", "arguments": {"text": "%s"}}</tool_call>',
        '<function=write>{"text": "%s"}</function>',
        '[TOOL_CALLS] [{"name": "write", "arguments": {"text": "%s"}}]',
        '[TOOL_CALLS]write[ARGS]{"text": "%s"}',
        '<|python_tag|>{"name": "write", "parameters": {"text": "%s"}}',
        '{"name": "write", "parameters": {"text": "%s"}}',
        "<tool_call>\n<function=write>\n<parameter=text>\n%s\n</parameter>\n</function>\n</tool_call>",
    ],
)
def test_a_string_may_hold_anything_unescaped_that_does_not_end_it(form: str, text: str) -> None:
    assert read_tool_calls(form % text, TOOLS).calls == write(text)


@given(st.text(), st.booleans())
def test_every_string_survives(text: str, ascii_only: bool) -> None:
    call = json.dumps({"name": "write", "arguments": {"text": text}}, ensure_ascii=ascii_only)
    found = read_tool_calls(f"Well: <tool_call>\n{call}\n</tool_call> Done.", TOOLS)
    assert (found.content, found.calls) == ("Well:  Done.", write(text))


@given(st.text(alphabet="<>tool_call/{}\"':,`\n[]TOOL_CALLSfunction=parameter think", max_size=200))
def test_no_text_makes_the_search_fail(text: str) -> None:
    found = read_tool_calls(text, TOOLS)
    assert found.calls or found.content == text


@pytest.mark.parametrize(
    ("text", "thinks"),
    [
        (f"<think>I could <tool_call>{NOW}</tool_call></think>\nNo need.", None),
        (f"<think>I could <tool_call>{NOW}</tool_call>", None),
        (f"I could <tool_call>{NOW}</tool_call></think>\nNo need.", None),
        (f"I could <tool_call>{NOW}</tool_call>", ("<think>", "</think>")),
        ("[THINK]<function=now></function>[/THINK]4", None),
        (f"<think>{NOW}</think>", None),
        (f"<think>a</think>b<think><tool_call>{NOW}</tool_call></think>c", None),
    ],
)
def test_a_call_in_the_thinking_is_not_made(text: str, thinks: tuple[str, str] | None) -> None:
    found = read_tool_calls(text, TOOLS, thinks=thinks)
    assert (found.content, found.calls, found.rejected) == (text, (), ())


def test_a_call_after_the_thinking_is_made_and_the_thinking_stays_in_the_content() -> None:
    for before in ("<think>Shall I?</think>", "Shall I?</think>"):
        found = read_tool_calls(f"{before}\n<tool_call>{NOW}</tool_call>", TOOLS)
        assert (found.content, [call.name for call in found.calls]) == (before, ["now"])
    bare = read_tool_calls('<think>x</think>\n{"name": "now", "parameters": {}}', TOOLS)
    assert [call.name for call in bare.calls] == ["now"]


@pytest.mark.parametrize(
    "text", [f"So:\n```xml\n<tool_call>{NOW}</tool_call>\n```\n", f"`<tool_call>{NOW}</tool_call>`"]
)
def test_a_call_in_markdown_code_is_reported_and_not_made(text: str) -> None:
    found = read_tool_calls(text, TOOLS)
    assert (found.content, found.calls) == (text, ())
    assert [(call.text, call.reason) for call in found.rejected] == [
        (f"<tool_call>{NOW}</tool_call>", "it is written inside Markdown code")
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>{"name": "write", "arguments": {"text": "a", "text": "b"}}</tool_call>', "'text' is given twice"),
        ('<tool_call>{"name": "write", "arguments": {"times": 1,}}</tool_call>', "not JSON"),
        ("<tool_call>{'name': 'now'}</tool_call>", "not JSON"),
        ('<tool_call>{"name": "write", "arguments": {"times": NaN}}</tool_call>', "NaN is not JSON"),
        ('<tool_call>{"name": "write", "arguments": {"times": 1e999}}</tool_call>', "too large"),
        ('<tool_call>{"name": "write", "arguments": {"text": "\\ud800"}}</tool_call>', "surrogate"),
        ('<tool_call>{"name": "write", "arguments": [1]}</tool_call>', "not an object"),
        ('<tool_call>{"name": "now", "arguments": {}, "parameters": {"a": 1}}</tool_call>', "which differ"),
        ('<tool_call>{"name": "now"}}</tool_call>', "more text after the JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "nested too deeply"),
        ("<function=write><parameter=text>a</parameter><parameter=text>b</parameter></function>", "given twice"),
        ('{"name": "write", "parameters": {"text": "a", "text": "b"}}', "given twice"),
    ],
)
def test_a_passage_without_a_plain_meaning_is_reported_and_stays_in_the_text(text: str, reason: str) -> None:
    found = read_tool_calls(text, TOOLS)
    assert (found.content, found.calls) == (text, ())
    assert len(found.rejected) == 1
    assert reason in found.rejected[0].reason


@pytest.mark.parametrize(
    "cut",
    [
        '<tool_call>{"name": "write", "arguments": {"text": "a',
        "<tool_call>\n<function=write>\n<parameter=text>\na",
        '[TOOL_CALLS] [{"name": "now"}, {"name": "write", "argum',
        '[TOOL_CALLS]write[ARGS]{"text": ',
        '<|python_tag|>{"name": "write", "parameters": {"te',
        '{"name": "write", "parameters": {"text": "a',
        "[write(text='a', tim",
    ],
)
def test_a_call_that_was_cut_off_is_reported_and_not_made(cut: str) -> None:
    found = read_tool_calls(cut, TOOLS, is_cut=True)
    assert (found.content, found.calls) == (cut, ())
    assert [call.reason for call in found.rejected] == ["the response was cut off in the middle of the call"]
    first = read_tool_calls(f"<tool_call>{NOW}</tool_call><tool_call>{NOW[:12]}", TOOLS, is_cut=True)
    assert ([call.name for call in first.calls], len(first.rejected)) == (["now"], 1)


def test_objects_that_are_data_are_no_calls() -> None:
    for text in ('{"name": "now", "price": 5}', '{"name": "eve", "arguments": {}}', f"The call is {NOW}", "[]", "{}"):
        assert find_tool_calls(text, ["now"]) == (text, ())


def test_several_calls_in_one_reply_keep_their_order_and_their_own_ids() -> None:
    text = '{"name": "write", "parameters": {"text": "a"}}; {"name": "now", "parameters": {}}'
    assert [call.name for call in read_tool_calls(text, TOOLS).calls] == ["write", "now"]
    text = '[TOOL_CALLS]write[CALL_ID]abcdefghi[ARGS]{"text": "a"}[TOOL_CALLS]now[ARGS]{}'
    assert [(call.name, call.id) for call in read_tool_calls(text, TOOLS).calls] == [
        ("write", "abcdefghi"),
        ("now", ""),
    ]
    text = f"<tool_call>{NOW}\n{NOW}</tool_call> and <tool_call>{NOW}"
    assert [call.name for call in read_tool_calls(text, TOOLS).calls] == ["now"] * 3
    text = f"First <tool_call> opens a call: <tool_call>{NOW}</tool_call>"
    assert [call.name for call in read_tool_calls(text, TOOLS).calls] == ["now"]


def test_a_call_of_an_unknown_tool_or_with_wrong_arguments_is_a_call_with_its_problems() -> None:
    found = read_tool_calls('<tool_call>{"name": "eve", "arguments": {"a": 1}}</tool_call>', TOOLS)
    assert found.calls == (ToolCall(name="eve", arguments={"a": 1}, problems=("there is no tool 'eve'",)),)
    found = read_tool_calls('<tool_call>{"name": "write", "arguments": {"times": "often"}}</tool_call>', TOOLS)
    assert found.calls[0].arguments == {"times": "often"}
    assert found.calls[0].problems == ("times: 'often' is not an integer",)


def optional(kind: str) -> dict[str, Any]:
    return {"anyOf": [{"type": kind}, {"type": "null"}]}


@pytest.mark.parametrize(
    ("written", "schema", "value"),
    [
        ('"5"', {"type": "integer"}, 5),
        ("5.0", {"type": "integer"}, 5),
        ("12345678901234567890.0", {"type": "integer"}, 12345678901234567890),
        ('"-1e3"', {"type": "integer"}, -1000),
        ("5", {"type": "string"}, "5"),
        ("1.10", {"type": "string"}, "1.10"),
        ("true", {"type": "string"}, "true"),
        ('"2.50"', {"type": "number"}, 2.5),
        ('"True"', {"type": "boolean"}, True),
        ('"[1, \\"2\\"]"', {"type": "array", "items": {"type": "integer"}}, [1, 2]),
        ('{"a": "1", "b": [{"c": 2}]}', {"$ref": "#/$defs/Outer"}, {"a": 1, "b": [{"c": "2"}]}),
        ('"null"', optional("integer"), None),
        ('"null"', optional("string"), "null"),
        ('"7"', optional("integer"), 7),
        ("null", {"type": "string", "nullable": True}, None),
        ('"5"', {"type": ["integer", "string"]}, "5"),
        ("5", {"type": ["integer", "string"]}, 5),
        ('"2"', {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("1.5", {}, 1.5),
        ('[["1"]]', {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, [[1]]),
    ],
)
def test_arguments_get_the_types_of_the_schema_where_nothing_is_lost(written: str, schema: Any, value: Any) -> None:
    outer = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"$ref": "#/$defs/Inner"}}},
    }
    inner = {"type": "object", "properties": {"c": {"type": "string"}}}
    tool = {"properties": {"x": schema}, "$defs": {"Outer": outer, "Inner": inner}}
    arguments, problems = fit_arguments({"x": read_json(written)}, tool)
    assert (arguments, problems) == ({"x": value}, ())
    assert type(arguments["x"]) is type(value)


@pytest.mark.parametrize(
    ("written", "schema", "words"),
    [
        ("5.7", {"type": "integer"}, "5.7 is not an integer"),
        ('"5 apples"', {"type": "integer"}, "is not an integer"),
        ('"1e999999"', {"type": "integer"}, "is not an integer"),
        ("true", {"type": "integer"}, "true is not an integer"),
        ("1", {"type": "boolean"}, "1 is not true or false"),
        ('"nan"', {"type": "number"}, "is not a number"),
        ("null", {"type": "string"}, "null is not a string"),
        ('{"a": 1}', {"type": "string"}, "is not a string"),
        ('"a, b"', {"type": "array"}, "is not a list"),
        ('"Red"', {"enum": ["red", "blue"]}, "is none of 'red', 'blue'"),
        ('{"a": "x"}', {"type": "object", "properties": {"a": {"type": "integer"}}}, "a: 'x' is not an integer"),
    ],
)
def test_what_has_no_loss_free_form_stays_as_written_and_is_reported(written: str, schema: Any, words: str) -> None:
    arguments, (problem,) = fit_arguments({"x": read_json(written)}, {"properties": {"x": schema}})
    assert arguments == {"x": json.loads(written)}
    assert problem.startswith("x: ")
    assert words in problem


def test_missing_and_unknown_arguments_are_reported() -> None:
    schema = {"properties": {"a": {}}, "required": ["a"], "additionalProperties": False}
    assert fit_arguments({"b": 1}, schema) == (
        {"b": 1},
        ("b: there is no such argument", "a: is required and missing"),
    )


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("00501", {"type": "string"}, "00501"),
        ("501", {"type": "string"}, "501"),
        ("null", {"type": "string"}, "null"),
        ("null", optional("string"), None),
        ("1.10", {}, "1.10"),
        ("5", {}, 5),
        ('{"a": 1}', {}, {"a": 1}),
        ("5", {"type": ["integer", "string"]}, 5),
        ("five", {"type": ["integer", "string"]}, "five"),
        ('"q"', {"type": "string"}, '"q"'),
    ],
)
def test_text_without_types_takes_the_schemas(text: str, schema: Any, value: Any) -> None:
    assert fit_arguments({"x": Untyped(text)}, {"properties": {"x": schema}}) == ({"x": value}, ())
    assert type(fit_arguments({"x": Untyped(text)}, {"properties": {"x": schema}})[0]["x"]) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "[write(text='a', times=2)]",
        '[ write(text="a", times="2") ]\n',
        "<|python_start|>[write(times=2, text='a')]<|python_end|>",
        "<think>[now()]</think>[write(text='a', times=2)]",
    ],
)
def test_a_call_written_as_python_is_read_and_never_run(text: str) -> None:
    assert read_tool_calls(text, TOOLS).calls == (ToolCall(name="write", arguments={"text": "a", "times": 2}),)
    values = "[write(text=-1.50, times=-2, more={'a': [None, True, false]})]"
    arguments = read_tool_calls(values, TOOLS).calls[0].arguments
    assert arguments == {"text": "-1.50", "times": -2, "more": {"a": [None, True, False]}}
    for no_call in ("[1, 2]", "[eve(a=1)]", "now()", "x = [now()]"):
        assert read_tool_calls(no_call, TOOLS).calls == ()
    for bad in ("[write('a')]", "[write(text=open('/etc/passwd'))]", "[write(text='a', text='b')]", "[write(**{})]"):
        found = read_tool_calls(bad, TOOLS)
        assert (found.content, found.calls, len(found.rejected)) == (bad, (), 1)
    for deep in ("[" * 50_000 + "now()", "[write(text=" + "-" * 50_000 + "1)]", "[A(A=" + "\t)A(A=,\t" * 40):
        assert read_tool_calls(deep, TOOLS).calls == ()


@pytest.mark.parametrize("end", ["<|eot_id|>", "<|im_end|>\n", "</s>", " <|eom_id|><|end_of_text|>"])
def test_the_token_that_ends_a_turn_is_no_part_of_a_call_or_of_the_content(end: str) -> None:
    for call in (
        f"<tool_call>{NOW}</tool_call>",
        '{"name": "now", "parameters": {}}',
        f"[TOOL_CALLS] [{NOW}]",
        "[now()]",
    ):
        found = read_tool_calls(call + end, TOOLS)
        assert ([one.name for one in found.calls], found.content) == (["now"], "")
