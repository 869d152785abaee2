"""A reward model sees what its own tokenizer's chat template renders, with tool calls, and special tokens once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text

from tests.tokenizers_made import INST, THINKING, TOOLS, make_tokenizer
from torchrl_sglang import ConfigError
from torchrl_sglang.scores import RewardModel, RewardModelTransform

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TALK = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "It is 5."},
]


@pytest.fixture
def scorer() -> Iterator[tuple[str, list[list[int]]]]:
    """A server whose score is the number of tokens, and the sequences that it got."""
    got: list[list[int]] = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body: Any, status: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            answers = {
                "/model_info": {"model_path": "-", "weight_version": "default", "is_generation": False},
                "/server_info": {"max_req_input_len": 500},
            }
            self.reply(answers.get(self.path, {}), 200 if self.path in answers else 405)

        def do_POST(self) -> None:
            ids_B_T = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input_ids"]
            got.extend(ids_B_T)
            self.reply([{"embedding": [len(ids_T)]} for ids_T in ids_B_T])

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


def rewarded(transform: RewardModelTransform, td: TensorDict) -> list[float]:
    return transform._step(td, td.clone())["reward"].flatten().tolist()


def history(messages: list[dict[str, Any]]) -> TensorDict:
    kept = [{key: value for key, value in message.items() if key != "tool_call_id"} for message in messages]
    full = History.from_chats([kept])
    return TensorDict(history=ChatHistory(full=full, batch_size=[1]), batch_size=[1])


def test_a_history_is_scored_with_its_tool_calls(scorer: tuple[str, list[list[int]]]) -> None:
    url, got = scorer
    tokenizer = make_tokenizer("byte-level", chat_template=TOOLS)
    tools = [{"type": "function", "function": {"name": "add"}}]
    model = RewardModel(url, tokenizer)
    expected = tokenizer.apply_chat_template(TALK, return_dict=False)
    with_tools = tokenizer.apply_chat_template(TALK, return_dict=False, tools=tools)
    assert rewarded(RewardModelTransform(model), history(TALK)) == [len(expected)]
    rewarded(RewardModelTransform(model, template_kwargs={"tools": tools}), history(TALK))
    rewarded(RewardModelTransform(RewardModel(url, tokenizer, template_kwargs={"tools": tools})), history(TALK))
    model.get_scores([TALK], template_kwargs={"tools": tools})
    assert got == [expected, *[with_tools] * 3]
    assert "<tool_call>add" in tokenizer.decode(expected)


def test_a_text_is_scored_with_its_special_tokens_once(scorer: tuple[str, list[list[int]]]) -> None:
    url, got = scorer
    for kind in ("byte-level", "sentencepiece"):
        tokenizer = make_tokenizer(kind, chat_template=INST, eos_added=True)
        rendered = tokenizer.apply_chat_template(TALK[:1], tokenize=False)
        answered = tokenizer.apply_chat_template([TALK[0], TALK[3]], tokenize=False)
        td = TensorDict(text=Text(full=["plain", rendered, answered], batch_size=[3]), batch_size=[3])
        got.clear()
        rewarded(RewardModelTransform(RewardModel(url, tokenizer)), td)
        assert got == [
            tokenizer("plain")["input_ids"],
            [*tokenizer(rendered, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
            tokenizer(answered, add_special_tokens=False)["input_ids"],
        ]


def test_the_template_can_be_given_and_its_absence_is_told(scorer: tuple[str, list[list[int]]]) -> None:
    url, got = scorer
    tokenizer = make_tokenizer("byte-level", chat_template=None)
    with pytest.raises(ConfigError, match="no chat template.*pass chat_template="):
        RewardModel(url, tokenizer).get_scores(["a text", TALK])
    assert got == []
    talk = [TALK[0], TALK[3]]
    RewardModel(url, tokenizer, chat_template=THINKING).get_scores([talk])
    assert got == [tokenizer.apply_chat_template(talk, chat_template=THINKING, return_dict=False)]
    refusing = RewardModel(url, tokenizer, chat_template="{{ raise_exception('no tools here') }}")
    with pytest.raises(ConfigError, match="text 1: the chat template refuses .*no tools here"):
        refusing.get_scores(["x", talk])
