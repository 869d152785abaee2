"""The parsers of a real server read the formats of families whose calls this package does not read itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from torchrl_sglang.chat import SGLangChat
from torchrl_sglang.chat.response import ToolCall
from torchrl_sglang.chat.tool_call_reader import ToolCallReader
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.server import SGLangServer

ADD = {"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": ADD}}]
WRITTEN = {
    "deepseekv3": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": "1"}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi_k2": '<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{"a": 1}'
    "<|tool_call_end|><|tool_calls_section_end|>",
    "gpt-oss": '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>',
    "glm45": "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "lfm2": "<|tool_call_start|>[add(a=1)]<|tool_call_end|>",
    "qwen3_coder": "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "qwen25": '<tool_call>\n{"name": "add", "arguments": {"a": "1"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1}',
}


def read(tokenizer: Any, server: SGLangServer, parser: str, text: str) -> Any:
    ids_T = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids_T) == text
    reply = GenerateReply(text=text, output_ids=ids_T, finish_reason="stop")
    client = SGLangClient(server.url)
    return ToolCallReader(tokenizer, lambda: client, named=None, known=parser).read([], reply, TOOLS)


@pytest.fixture(scope="module")
def any_text(tiny_llama: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    if tokenizer.decode(tokenizer("▁｜é", add_special_tokens=False)["input_ids"]) != "▁｜é":
        pytest.fail("the tiny model's tokenizer can't spell every text")
    return tokenizer


@pytest.mark.parametrize("parser", WRITTEN)
def test_the_servers_parser_and_this_packages_together_find_every_familys_call(
    parser: str, any_text: Any, server: SGLangServer
) -> None:
    found = read(any_text, server, parser, WRITTEN[parser])
    assert found.calls == (ToolCall(name="add", arguments={"a": 1}),)
    thinking = f"<think>{WRITTEN[parser]}</think>No."
    assert read(any_text, server, parser, thinking).calls == ()


def test_a_line_break_in_a_string_is_found_though_the_servers_parser_loses_it(
    any_text: Any, server: SGLangServer
) -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {"s": "one\ntwo"}}\n</tool_call>'
    assert read(any_text, server, "qwen25", text).calls == (ToolCall(name="add", arguments={"s": "one\ntwo"}),)


def test_a_parser_that_the_server_does_not_have_is_refused_by_name(server: SGLangServer) -> None:
    with pytest.raises(ConfigError, match="tool_call_parser='qwen9'"):
        SGLangChat(server.url, tool_call_parser="qwen9")
