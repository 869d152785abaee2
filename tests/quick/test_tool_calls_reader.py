"""Which parser reads a response's tool calls, what is done when the server's loses some, and the ids of calls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from torchrl_sglang.chat.messages import read_conversation
from torchrl_sglang.chat.response import Response, ToolCall
from torchrl_sglang.chat.template import ChatTemplate
from torchrl_sglang.chat.tool_call_reader import LOCAL, ToolCallReader, call_ids
from torchrl_sglang.chat.tool_parsers import parser_for
from torchrl_sglang.errors import ConfigError, RequestRejectedError, ServerLostError
from torchrl_sglang.protocol.messages import GenerateReply, HttpRequest

WRITE = {"type": "object", "properties": {"text": {"type": "string"}, "times": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "write", "parameters": WRITE}}]
PLAIN = '<tool_call>\n{"name": "write", "arguments": {"text": "a"}}\n</tool_call>'
WRITE_A = (ToolCall(name="write", arguments={"text": "a"}),)


class Characters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids: list[int], **settings: Any) -> str:
        assert settings == {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return "".join(map(chr, ids))


class Server:
    """Answers every request with ``answer``, or raises it, and keeps the requests."""

    url = "http://host"

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.requests: list[HttpRequest] = []

    def send(self, request: HttpRequest) -> Any:
        self.requests.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def answer(content: str, *calls: tuple[str, str]) -> dict[str, Any]:
    return {"normal_text": content, "calls": [{"name": name, "parameters": text} for name, text in calls]}


def reply(text: str, finish: str = "stop", matched: Any = None) -> GenerateReply:
    ids_T = [*map(ord, text)] + ([matched] if isinstance(matched, int) else [])
    return GenerateReply(text=text, output_ids=ids_T, finish_reason=finish, matched=matched)  # type: ignore[arg-type]


def reader(server: Any, *, named: str | None = None, known: str | None = None) -> ToolCallReader:
    return ToolCallReader(Characters(), lambda: server, named=named, known=known)


def test_the_servers_parser_reads_a_format_that_is_not_read_here() -> None:
    server = Server(answer("Wait.", ("write", '{"text": "a", "times": "2"}')))
    found = reader(server, known="deepseekv3").read([], reply("Wait.<｜tool▁call▁begin｜>..."), TOOLS)
    assert (found.content, found.calls) == (
        "Wait.",
        (ToolCall(name="write", arguments={"text": "a", "times": 2}),),
    )
    assert server.requests[0].path == "/parse_function_call"
    assert server.requests[0].body == {
        "text": "Wait.<｜tool▁call▁begin｜>...",
        "tools": TOOLS,
        "tool_call_parser": "deepseekv3",
    }


def test_the_server_does_not_see_the_thinking_and_the_content_keeps_it() -> None:
    server = Server(answer("Now.", ("write", '{"text": "a"}')))
    prompt = [*map(ord, "<|assistant|>\n<think>\n")]
    found = reader(server, known="glm45").read(prompt, reply("Hm <tool_call>x</think>Now.<tool_call>y"), TOOLS)
    assert server.requests[0].body is not None
    assert server.requests[0].body["text"] == "Now.<tool_call>y"
    assert (found.content, found.calls) == ("Hm <tool_call>x</think>Now.", WRITE_A)
    server.requests.clear()
    assert reader(server, known="glm45").read(prompt, reply("Hm <tool_call>y"), TOOLS).calls == ()
    assert server.requests == []


def test_calls_that_the_servers_parser_loses_are_found_all_the_same() -> None:
    lost = Server(answer(""))
    found = reader(lost, known="qwen25").read([], reply(PLAIN.replace('"a"', '"a\nb"')), TOOLS)
    assert found.calls == (ToolCall(name="write", arguments={"text": "a\nb"}),)
    rounded = Server(answer("", ("write", '{"text": 1.1}')))
    found = reader(rounded, known="qwen25").read([], reply(PLAIN.replace('"a"', "1.10")), TOOLS)
    assert found.calls == (ToolCall(name="write", arguments={"text": "1.10"}),)
    guessed = Server(answer("", ("write", '{"text": "b"}')))
    found = reader(guessed, known="qwen25").read([], reply(PLAIN.replace('"a"', '"a", "text": "b"')), TOOLS)
    assert found.calls == ()
    assert "given twice" in found.rejected[0].reason


def test_a_server_without_the_parser_or_the_endpoint_changes_nothing_unless_it_was_named() -> None:
    for error in (
        RequestRejectedError("no", server="u", status=404, detail=""),
        ServerLostError("gone", server="u"),
    ):
        assert reader(Server(error), known="qwen25").read([], reply(PLAIN), TOOLS).calls == WRITE_A
    with pytest.raises(ConfigError, match="tool_call_parser='qwen9': http://host has no such parser"):
        reader(Server(RequestRejectedError("no", server="u", status=500, detail="")), named="qwen9")
    server = Server(answer(""))
    named = reader(server, named="qwen25")
    server.answer = ServerLostError("gone", server="u")
    with pytest.raises(ServerLostError):
        named.read([], reply(PLAIN), TOOLS)
    assert reader(None, named=LOCAL, known="qwen25").read([], reply(PLAIN), TOOLS).calls == WRITE_A
    assert reader(None).read([], reply(PLAIN), TOOLS).calls == WRITE_A


def test_the_server_is_not_asked_what_would_keep_it_busy() -> None:
    server = Server(answer(""))
    call = "[write(text='a')]"
    for named, known in (("pythonic", None), (None, "pythonic")):
        assert reader(server, named=named, known=known).read([], reply(call), TOOLS).calls == WRITE_A
    asked = reader(server, known="glm45")
    asked.read([], reply("<tool_call>" * 201), TOOLS)
    assert server.requests == []
    asked.read([], reply("<tool_call>" * 20), TOOLS)
    assert len(server.requests) == 1


def test_what_ended_the_response_is_no_part_of_it() -> None:
    bare = '{"name": "write", "parameters": {"text": "a"}}'
    assert reader(None).read([], reply(bare, matched=ord("$")), TOOLS).calls == WRITE_A
    assert reader(None).read([], reply(f"{bare}\nObservation", matched="\nObservation"), TOOLS).calls == WRITE_A
    cut = reader(None).read([], reply(bare[:-4], finish="length"), TOOLS)
    assert "cut off" in cut.rejected[0].reason


TEMPLATES = {
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>",
    "deepseekv3": "'<｜tool▁calls▁begin｜>' + '```json'",
    "deepseekv31": "'<｜tool▁calls▁begin｜>' + tool['name']",
    "gpt-oss": "<|start|>assistant<|channel|>final<|message|>",
    "qwen3_coder": "<tool_call>\n<function=name>\n<parameter=key>",
    "qwen25": '<|im_start|>...<tool_call>\n{"name": ',
    "glm45": "<tool_call>' + name + '\\n<arg_key>' + k + '</arg_key>\\n<arg_value>",
    "mistral": "[AVAILABLE_TOOLS]...[TOOL_CALLS]",
    "llama3": '<|start_header_id|>ipython ... "parameters"',
    "minimax-m2": "<minimax:tool_call><invoke name=",
}


def test_the_parser_is_known_by_flag_template_architecture_or_name_in_this_order() -> None:
    for parser, template in TEMPLATES.items():
        assert parser_for(template=template) == parser
    assert parser_for(template=TEMPLATES["mistral"], config={"model_type": "qwen3"}) == "mistral"
    assert parser_for(template=TEMPLATES["mistral"], server_flag="hermes") == "hermes"
    assert parser_for(template=TEMPLATES["mistral"], server_flag="auto") == "mistral"
    assert parser_for(config={"model_type": "x", "text_config": {"model_type": "gpt_oss"}}) == "gpt-oss"
    assert parser_for(model="/models/Hermes-3-Llama-3.1-8B/") == "hermes"
    assert parser_for(template="{{ messages }}", config={"model_type": "llama"}, model="/m/tiny") is None


def test_the_same_response_has_the_same_ids_and_others_have_others() -> None:
    def ids(prompt: int, output: int) -> list[str]:
        named = call_ids(WRITE_A * 2, parser=None, ids_T=[prompt], output_ids=[output], earlier_calls=0)
        return [call.id for call in named]

    assert ids(1, 2) == ids(1, 2)
    every = ids(1, 2) + ids(1, 3) + ids(2, 2)
    assert len(set(every)) == 6
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", one) for one in every)


def test_an_id_that_the_model_wrote_stays_if_it_can_serve() -> None:
    def ids(*written: str, parser: str | None = None) -> list[str]:
        calls = [ToolCall(name="f", id=one) for one in written]
        return [call.id for call in call_ids(calls, parser=parser, ids_T=[1], output_ids=[2], earlier_calls=0)]

    assert ids("abc", "VvvODy9mT") == ["abc", "VvvODy9mT"]
    mistral = ids("abc", "VvvODy9mT", parser="mistral")
    assert mistral[1] == "VvvODy9mT"
    assert re.fullmatch("[a-zA-Z0-9]{9}", mistral[0])
    assert len(set(ids("1", "1"))) == 2


STRICT_IDS = """{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}
{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids must have 9 characters') }}{% endif %}
[{{ c.id }}]{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}
{% elif m.role == 'tool' %}[{{ m.tool_call_id }}]={{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"""


def test_a_template_that_requires_ids_takes_the_response_and_the_tools_answer(tiny_llama: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = STRICT_IDS
    calls = call_ids(WRITE_A, parser="mistral", ids_T=[1], output_ids=[2], earlier_calls=0)
    response = Response(text="x", tool_calls=calls, prompt_length=1, response_length=1, finish_reason="stop")
    messages = [
        {"role": "user", "content": "Write."},
        response.message,
        {"role": "tool", "tool_call_id": calls[0].id, "content": "done"},
    ]
    ids_T = ChatTemplate(tokenizer).encode(read_conversation(messages))
    assert ids_T == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    with pytest.raises(ConfigError, match="9 characters"):
        without = Response(text="x", tool_calls=WRITE_A, prompt_length=1, response_length=1, finish_reason="stop")
        ChatTemplate(tokenizer).encode(read_conversation([messages[0], without.message]))
