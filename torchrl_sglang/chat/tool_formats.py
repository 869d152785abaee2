"""The formats in which models write tool calls, read at one place of a text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.chat.pythonic_calls import read_pythonic
from torchrl_sglang.chat.tool_arguments import Untyped
from torchrl_sglang.chat.tool_json import read_json, read_json_at

__all__ = ["FORMATS", "Passage", "Reader", "WrittenCall", "read_bare", "without_end"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenCall:
    """A call as it was written: types are not yet those of the tool's schema.

    Attributes:
        name: the tool's name.
        arguments: by name; :class:`~torchrl_sglang.chat.tool_arguments.Untyped` where the format has no types.
        id: the id that the model gave it; empty if it gave none.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A passage of a text that is written as calls.

    Attributes:
        end: where the passage ends.
        calls: the calls in it.
        fault: why the passage is no call; then ``calls`` is empty.
        is_cut: the text ends in the middle of it.
    """

    end: int
    calls: tuple[WrittenCall, ...] = ()
    fault: str = ""
    is_cut: bool = False


_END_TOKENS = (
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|eot|>", "<|eom|>", "<|python_end|>"),
    *("<|im_end|>", "<|endoftext|>", "</s>"),
)


def without_end(text: str) -> str:
    """The text without the tokens that end a turn in some families, which are no part of a call."""
    text = text.rstrip()
    while (end := next((token for token in _END_TOKENS if text.endswith(token)), None)) is not None:
        text = text.removesuffix(end).rstrip()
    return text


_SPACE = re.compile(r"\s*")


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def read_call(value: Any, *, bare: bool = False) -> WrittenCall:
    """The call that a JSON object describes.

    Args:
        value: ``{"name": ..., "arguments": {...}}``, or with ``parameters``, or inside ``{"function": ...}``.
        bare: nothing but the object says that it is a call: then it must have nothing else.

    Raises:
        ValueError: it describes none.
    """
    call_id = value.get("id") if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and "name" not in value and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("it is not an object with the name of a tool")
    given = [value[key] for key in ("arguments", "parameters") if key in value]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError("it has arguments and parameters, which differ")
    if bare and set(value) - {"name", "arguments", "parameters", "id", "type"}:
        raise ValueError("it is an object, but not written as a call")
    arguments = given[0] if given else {}
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError("its arguments are not an object")
    return WrittenCall(name=value["name"], arguments=arguments, id=call_id if isinstance(call_id, str) else "")


_PYTHONIC = re.compile(r"\[\s*[A-Za-z_][\w.]*\(")


def read_bare(text: str) -> tuple[WrittenCall, ...]:
    """Calls from a text that is nothing but JSON objects, a list of them, or a list of calls in Python's form.

    Raises:
        ValueError: the text is something else.
    """
    calls: list[WrittenCall] = []
    at, body = 0, without_end(text).strip()
    if _PYTHONIC.match(body):
        return tuple(WrittenCall(name=name, arguments=arguments) for name, arguments in read_pythonic(body))
    while at < len(body):
        value, at = read_json_at(body, at)
        calls += [read_call(item, bare=True) for item in (value if isinstance(value, list) else [value])]
        at = _skip(body, at)
        if body[at : at + 1] == ";" and at + 1 < len(body):  # Llama 3 puts it between calls
            at = _skip(body, at + 1)
    if not calls:
        raise ValueError("it is empty")
    return tuple(calls)


def _read_tagged(close: str) -> Callable[[str, re.Match[str]], Passage]:
    """Reader of JSON between an opening and a closing tag; the text may end where the closing tag should be."""

    def read(text: str, opening: re.Match[str]) -> Passage:
        start = _skip(text, opening.end())
        if text.startswith("<function=", start):
            match = _FUNCTION_OPEN.match(text, start)
            if match is not None:
                passage = _read_function(text, match)
                after = _skip(text, passage.end)
                return _longer(passage, after + len(close)) if text.startswith(close, after) else passage
        calls: list[WrittenCall] = []
        end = start
        try:
            while end == start or text.startswith("{", end):
                value, end = read_json_at(text, end)
                calls += [read_call(item) for item in (value if isinstance(value, list) else [value])]
                end = _skip(text, end)
        except ValueError as error:
            return _faulty(text, end, opening[0], close, str(error))
        if text.startswith(close, end):
            return Passage(end=end + len(close), calls=tuple(calls))
        if end == len(text) or text.startswith(opening[0], end) or not without_end(text[end:]):
            return Passage(end=end, calls=tuple(calls))
        return _faulty(text, end, opening[0], close, f"there is more text after the JSON: {text[end : end + 40]!r}")

    return read


def _faulty(text: str, start: int, tag: str, close: str, fault: str) -> Passage:
    """A passage that can't be read: up to its closing tag, the next opening tag, or the end of the text."""
    following = text.find(tag, start)
    end = text.find(close, start, following if following >= 0 else len(text)) if close else -1
    if end >= 0:
        return Passage(end=end + len(close), fault=fault)
    return Passage(end=following if following >= 0 else len(text), fault=fault, is_cut=following < 0)


def _longer(passage: Passage, end: int) -> Passage:
    return Passage(end=end, calls=passage.calls, fault=passage.fault, is_cut=passage.is_cut)


_FUNCTION_OPEN = re.compile(r"<function=([^>\n]+)>")
_PARAMETER_OPEN = re.compile(r"\s*<parameter=([^>\n]+)>")
# A value may hold the closing tag itself: the one that counts is followed by the next tag.
_PARAMETER_CLOSE = re.compile(r"</parameter>(?=\s*(?:<parameter=|</function>))")


def _read_function(text: str, opening: re.Match[str]) -> Passage:
    """``<function=name>`` with a JSON object (Llama 3) or ``<parameter=key>`` tags (Qwen3-Coder)."""
    name, at, tags = opening[1].strip(), opening.end(), ("<function=", "</function>")
    arguments: dict[str, Any] = {}
    start = _skip(text, at)
    if text.startswith("{", start):
        try:
            value, end = read_json_at(text, start)
        except ValueError as error:
            return _faulty(text, start, *tags, str(error))
        at, arguments = end, value
    while (parameter := _PARAMETER_OPEN.match(text, at)) is not None:
        end_tag = _PARAMETER_CLOSE.search(text, parameter.end())
        key = parameter[1].strip()
        if end_tag is None:
            return _faulty(text, parameter.end(), *tags, f"the parameter {key!r} has no end")
        if key in arguments:
            return _faulty(text, end_tag.end(), *tags, f"the parameter {key!r} is given twice")
        value_text = text[parameter.end() : end_tag.start()]
        arguments[key] = Untyped(value_text.removeprefix("\n").removesuffix("\n"))
        at = end_tag.end()
    end = _skip(text, at)
    calls = (WrittenCall(name=name, arguments=arguments),)
    if text.startswith(tags[1], end):
        return Passage(end=end + len(tags[1]), calls=calls)
    if end == len(text) and at > opening.end():
        return Passage(end=end, calls=calls)
    return _faulty(text, end, *tags, f"expected {tags[1]}, found {text[end : end + 40]!r}")


_MISTRAL_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?\s*(?=\{)")


def _read_mistral(text: str, opening: re.Match[str]) -> Passage:
    """``[TOOL_CALLS]`` with a list of calls, or with ``name[ARGS]{...}``, with or without ``[CALL_ID]``."""
    named = _MISTRAL_CALL.match(text, opening.end())
    start = named.end() if named else _skip(text, opening.end())
    calls: tuple[WrittenCall, ...]
    try:
        value, end = read_json_at(text, start)
        if named:
            calls = (WrittenCall(name=named[1], arguments=value, id=named[2] or ""),)
        else:
            calls = tuple(read_call(item) for item in (value if isinstance(value, list) else [value]))
    except ValueError as error:
        return _faulty(text, opening.end(), opening[0], "", str(error))
    return Passage(end=end, calls=calls)


def _read_python_tag(text: str, opening: re.Match[str]) -> Passage:
    """``<|python_tag|>`` with JSON objects up to the end or the next tag (Llama 3), or a list of calls (Llama 4)."""
    following = text.find(opening[0], opening.end())
    end = following if following >= 0 else len(text)
    try:
        return Passage(end=end, calls=read_bare(text[opening.end() : end]))
    except ValueError as error:
        return Passage(end=end, fault=str(error), is_cut=following < 0)


Reader = Callable[[str, re.Match[str]], Passage]

FORMATS: tuple[tuple[re.Pattern[str], Reader], ...] = (
    (re.compile(r"<tool_call>"), _read_tagged("</tool_call>")),  # Hermes, Qwen
    (re.compile(r"<\|tool_call\|>"), _read_tagged("<|/tool_call|>")),  # Phi-4, Granite
    (re.compile(r"<TOOLCALL>"), _read_tagged("</TOOLCALL>")),  # Nemotron
    (_FUNCTION_OPEN, _read_function),
    (re.compile(r"\[TOOL_CALLS\]"), _read_mistral),
    (re.compile(r"<\|python_(?:tag|start)\|>"), _read_python_tag),
)
"""A pattern that finds where a passage begins, and the function that reads it."""
