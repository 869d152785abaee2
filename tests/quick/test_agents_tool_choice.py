"""``tool_choice`` beside ``response_format``: which grammar a request becomes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from torchrl_sglang.agents.tool_choice import constrain
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError

SCHEMA = {"type": "object", "properties": {"answer": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {name: {}}}}}
    for name in ("add", "now")
]


def grammar(family: str | None = "qwen25", choice: Any = "auto", **settings: Any) -> Any:
    thinking_end = settings.pop("thinking_end", None)
    parallel = settings.pop("parallel", True)
    made = constrain(
        SamplingParams(**settings),
        tools=TOOLS,
        tool_choice=choice,
        parallel=parallel,
        family=family,
        thinking_end=thinking_end,
    )
    return None if made.structural_tag is None else json.loads(str(made.structural_tag))["format"], made


def names(calls: Any) -> list[str]:
    return [tag["begin"].split('"name": "')[1].split('"')[0] for tag in calls["tags"]]


@pytest.mark.parametrize("family", ["qwen25", "hermes", "llama3", "mistral", None])
def test_a_request_with_tools_and_a_schema_is_answered_by_calls_or_by_json(family: str | None) -> None:
    form, made = grammar(family, json_schema=SCHEMA)
    calls, written = form["elements"]
    assert form["type"] == "or"
    assert names(calls) == ["add", "now"]
    assert written == {"type": "json_schema", "json_schema": SCHEMA}
    assert made.json_schema is None


def test_a_forced_call_goes_before_the_schema() -> None:
    form, made = grammar(choice="required", json_schema=SCHEMA)
    assert (form["type"], names(form), made.json_schema) == ("tags_with_separator", ["add", "now"], None)
    named, _ = grammar(choice={"type": "function", "function": {"name": "now"}}, json_schema=SCHEMA)
    assert names(named) == ["now"]


def test_a_request_that_forbids_calls_is_answered_by_json_alone() -> None:
    form, made = grammar(choice="none", json_schema=SCHEMA)
    assert (form, json.loads(str(made.json_schema))) == (None, SCHEMA)


@pytest.mark.parametrize("schema", [SCHEMA, "$$ANY$$"])
def test_where_no_grammar_of_calls_is_known_the_schema_alone_counts(schema: Any) -> None:
    form, made = grammar("deepseekv3" if schema == SCHEMA else "qwen25", json_schema=schema)
    assert form is None
    assert made.json_schema is not None


def test_thinking_that_the_prompt_has_opened_comes_first() -> None:
    form, _ = grammar(json_schema=SCHEMA, thinking_end="</think>")
    thinking, rest = form["elements"]
    assert (form["type"], thinking["end"], rest["type"]) == ("sequence", "</think>\n\n", "or")


def test_one_call_alone_is_the_only_one_of_its_grammar() -> None:
    form, made = grammar(json_schema=SCHEMA, parallel=False)
    assert form["elements"][0]["stop_after_first"] is True
    assert made.stop == ("</tool_call>",)


def test_other_grammars_beside_a_forced_call_are_refused() -> None:
    with pytest.raises(ConfigError, match="and regex both constrain"):
        grammar(choice="required", regex="a+")
