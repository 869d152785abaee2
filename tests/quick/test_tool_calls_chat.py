"""A chat with tools from end to end: what the server wrote, the calls in the response, and the next turn."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import transformers

from tests.fake_sglang import FakeServer
from torchrl_sglang.chat import SGLangChat
from torchrl_sglang.chat.response import Response, ToolCall

ADD = {
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "1", "b": 2}}\n</tool_call>'


class Scripted(ThreadingHTTPServer):
    """A server whose model writes ``text``; what it does not script comes from a fake SGLang server."""

    daemon_threads = True

    def __init__(self, behind: str, tokenizer: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.tokenizer = behind, tokenizer
        self.text, self.parsed, self.flag = "", {}, None
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        answer = requests.get(self.server.behind + self.path, timeout=30)
        body = answer.json() if answer.content else ""
        if self.path == "/server_info":
            body["tool_call_parser"] = self.server.flag
        self.reply(answer.status_code, json.dumps(body))

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        asked = json.loads(raw)
        if self.path == "/parse_function_call":
            self.server.asked.append(asked)
            self.reply(200, json.dumps(self.server.parsed))
        elif self.path == "/generate":
            self.generate(asked)
        else:
            answer = requests.post(self.server.behind + self.path, data=raw, timeout=30)
            self.reply(answer.status_code, answer.text)

    def generate(self, asked: dict[str, Any]) -> None:
        ids_T = self.server.tokenizer(self.server.text, add_special_tokens=False)["input_ids"]
        meta = {
            "id": "1",
            "finish_reason": {"type": "stop"},
            "prompt_tokens": len(asked["input_ids"][0]),
            "completion_tokens": len(ids_T),
            "cached_tokens": 0,
            "weight_version": "default",
        }
        reply = {"text": self.server.text, "output_ids": ids_T, "meta_info": meta}
        if asked.get("stream"):
            self.reply(200, f"data: {json.dumps(reply)}\n\ndata: [DONE]\n\n", "text/event-stream")
        else:
            self.reply(200, json.dumps([reply]))

    def reply(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def scripted(fake: FakeServer, tiny_llama: Path) -> Iterator[Scripted]:
    server = Scripted(fake.url, transformers.AutoTokenizer.from_pretrained(tiny_llama))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_call_has_its_types_and_an_id_and_the_tools_answer_continues_the_chat(scripted: Scripted) -> None:
    scripted.text = f"Let me see.\n{CALL}"
    chat = SGLangChat(scripted.url)
    question = {"role": "user", "content": "1 + 2?"}
    (response,) = chat.chat([question], tools=[ADD])
    assert response.content == "Let me see."
    assert response.tool_calls == (ToolCall(name="add", arguments={"a": 1, "b": 2}),)
    call_id = response.tool_calls[0].id
    assert len(call_id) == 9
    assert call_id.isalnum()
    assert response.message["tool_calls"][0]["id"] == call_id
    assert scripted.asked == [], "the family of this model is not known"
    result = {"role": "tool", "tool_call_id": call_id, "content": "3"}
    (second,) = chat.chat([question, response.message, result], tools=[ADD])
    assert second.tool_calls[0].id != call_id
    streamed: list[Response] = []
    pieces = list(chat.iter_chat([question], tools=[ADD], on_finish=streamed.append))
    assert "".join(pieces) == response.text
    assert streamed == [response]
    assert streamed[0].tool_calls[0].id == call_id, "the same response to the same prompt has the same ids"


def test_the_parser_that_the_server_was_launched_with_reads_the_calls(scripted: Scripted) -> None:
    scripted.text, scripted.flag = "Well.<call>add 1 2", "deepseekv31"
    scripted.parsed = {"normal_text": "Well.", "calls": [{"name": "add", "parameters": '{"a": "1"}', "tool_index": 0}]}
    (response,) = SGLangChat(scripted.url).chat("1 + 2?", tools=[ADD])
    assert (response.content, response.tool_calls) == ("Well.", (ToolCall(name="add", arguments={"a": 1}),))
    assert [(asked["tool_call_parser"], asked["text"]) for asked in scripted.asked] == [("deepseekv31", scripted.text)]
    (without,) = SGLangChat(scripted.url, tool_call_parser="local").chat("1 + 2?", tools=[ADD])
    assert (without.tool_calls, len(scripted.asked)) == ((), 1)
    assert SGLangChat(scripted.url).chat("1 + 2?")[0].tool_calls == ()


def test_what_is_no_call_is_in_the_response_with_its_reason(scripted: Scripted) -> None:
    scripted.text = CALL.replace('"a": "1"', '"a": 1, "a": 2')
    (response,) = SGLangChat(scripted.url).chat("1 + 2?", tools=[ADD])
    assert (response.content, response.tool_calls) == (scripted.text, ())
    assert "given twice" in response.rejected_calls[0].reason
