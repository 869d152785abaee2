"""What agents in the wild send back, and ask for: recognised, honoured or refused, never recorded wrongly."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.agent_kit import Sampled, chat, check_parents, check_recorded, run, says, scripted, user
from tests.fake_sglang import FakeServer, FakeSettings
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang import AgentGateway
from torchrl_sglang.agents.http.chat_reply import ChatReply
from torchrl_sglang.agents.http.chunk_writer import ChunkWriter
from torchrl_sglang.agents.http.text_reply import TextReply
from torchrl_sglang.agents.types import TextRequest
from torchrl_sglang.config import SamplingParams

HI = {"role": "user", "content": "Hi"}
END = "<|im_end|>"
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


# ------------------------------------------------------------------ what they send back

STORED: dict[str, Callable[[str], str]] = {
    "composed characters": lambda text: unicodedata.normalize("NFC", text),
    "decomposed characters": lambda text: unicodedata.normalize("NFD", text),
    "Windows' ends of lines": lambda text: text.replace("\n", "\r\n"),
    "lines without spaces at their ends": lambda text: "\n".join(line.rstrip() for line in text.split("\n")),
    "trimmed": str.strip,
}


@pytest.mark.parametrize("stored", STORED)
def test_an_answer_is_recognised_as_a_client_stores_it_and_its_tokens_are_kept(stored: str) -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["ChatML"].source)
    said = " A u\u0308ber-cafe\u0301:  \n  line two \t\nthree \n"
    answers = [says(tokenizer, text, END) for text in (said, "Yes.")]
    sessions, model = scripted(tokenizer, lambda _: answers.pop(0))
    session = sessions.create()
    message = dict(chat(session, [user("q")]).choices[0].message)
    assert message["content"] == said
    message["content"] = STORED[stored](said)
    chat(session, [user("q"), message, user("more")])
    (whole,) = session.trajectories()
    check_recorded([whole], model.calls)
    assert whole.messages[1]["content"] == said


def test_arguments_of_calls_are_recognised_in_other_compositions() -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["thinking"].source)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": "cafe\u0301"}}\n</tool_call>'
    answers = [says(tokenizer, text, END) for text in (call, "Yes.")]
    sessions, model = scripted(tokenizer, lambda _: answers.pop(0))
    session = sessions.create()
    message = json.loads(json.dumps(chat(session, [user("q")], tools=(ADD,)).choices[0].message))
    function = message["tool_calls"][0]["function"]
    function["arguments"] = unicodedata.normalize("NFC", function["arguments"])
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "5"}
    chat(session, [user("q"), message, result], tools=(ADD,))
    (whole,) = session.trajectories()
    check_recorded([whole], model.calls)


def test_words_that_were_changed_are_another_conversation() -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["ChatML"].source)
    answers = [says(tokenizer, text, END) for text in ("x\u00b2 is four", "Yes.")]
    sessions, _ = scripted(tokenizer, lambda _: answers.pop(0))
    session = sessions.create()
    message = {**chat(session, [user("q")]).choices[0].message, "content": "x2 is four"}
    chat(session, [user("q"), message, user("more")])
    assert len(session.trajectories()) == 2
    check_parents(session.trajectories(), session.info().sampled_tokens)


# ------------------------------------------------------------------ what they get


def test_a_streamed_text_with_special_tokens_in_it_has_no_part_twice() -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["ChatML"].source)
    ids = tuple(tokenizer(f"One{END}two<|im_start|>three", add_special_tokens=False)["input_ids"])
    sessions, model = scripted(tokenizer, lambda _: Sampled(ids, "length"))
    session = sessions.create()
    for path in ("text", "chat"):
        reply: Any = (TextReply if path == "text" else ChatReply)(id="i", created=0, model="m", texts=None)
        writer = ChunkWriter(reply, include_usage=False)
        events: list[bytes] = []

        def report(progress: Any, writer: Any = writer, events: Any = events) -> None:
            events.extend(writer.progress(progress))

        if path == "text":
            turn = run(session.complete(TextRequest(prompt="Say", sampling={"ignore_eos": True}), report))
        else:
            turn = chat(session, [user("q")], report, sampling={"ignore_eos": True})
        events += writer.finish(turn)
        choices = [json.loads(event[6:])["choices"][0] for event in events if b"[DONE]" not in event]
        read = "".join(c["text"] if path == "text" else c["delta"].get("content") or "" for c in choices)
        assert read == "Onetwothree"
        whole = reply.whole(turn)["choices"][0]
        assert (whole["text"] if path == "text" else whole["message"]["content"]) == read
    run(session.complete(TextRequest(prompt="SayOnetwothree and more", sampling={"ignore_eos": True})))
    check_recorded(session.trajectories(), model.calls)
    assert len(session.trajectories()) == 2  # the text goes on behind the sampled tokens


# ------------------------------------------------------------------ what they ask for


@pytest.fixture(scope="module")
def gateway(tiny_llama: Path) -> Iterator[AgentGateway]:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as fake, AgentGateway(fake.url) as gateway:
        yield gateway


def post(gateway: AgentGateway, messages: list[dict[str, Any]], **fields: Any) -> httpx.Response:
    session = gateway.create_session()
    headers = {"Authorization": f"Bearer {session.api_key}"}
    body = {"model": "m", "max_tokens": 4, "messages": messages, **fields}
    return httpx.post(f"{session.base_url}/chat/completions", json=body, headers=headers, verify=False, timeout=30)


REFUSED: list[dict[str, Any]] = [
    {"continue_final_message": True},
    {"add_generation_prompt": False},
    {"skip_special_tokens": False},
    {"separate_reasoning": False},
    {"truncate_prompt_tokens": 100},
    {"thinking": {"type": "enabled"}},
    {"chat_template": "{{ messages }}"},
]


@pytest.mark.parametrize("fields", REFUSED, ids=lambda fields: next(iter(fields)))
def test_what_another_server_would_do_is_refused_with_a_way_out(gateway: AgentGateway, fields: dict[str, Any]) -> None:
    answer = post(gateway, [HI], **fields)
    error = answer.json()["error"]
    (name,) = fields
    assert answer.status_code == 400
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert "can't be honoured" in error["message"]


def test_fields_that_ask_for_what_is_the_case_are_taken(gateway: AgentGateway) -> None:
    fields = {
        "continue_final_message": False,
        "add_generation_prompt": True,
        "skip_special_tokens": True,
        "best_of": 1,
        "separate_reasoning": True,
        "echo": False,
        "thinking": {"type": "disabled"},
        "guided_json": None,
    }
    assert post(gateway, [HI], **fields).status_code == 200


def test_a_prefix_to_continue_is_refused(gateway: AgentGateway) -> None:
    talk = [HI, {"role": "assistant", "content": "The answer is", "prefix": True}]
    answer = post(gateway, talk)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[1].prefix")
    assert post(gateway, [HI, {**talk[1], "prefix": False}, HI]).status_code == 200


def test_arguments_may_be_an_object(gateway: AgentGateway) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert post(gateway, [*talk, {"role": "tool", "tool_call_id": "c", "content": "5"}]).status_code == 200
    call["function"]["arguments"] = [1]  # type: ignore[index]
    assert post(gateway, talk).status_code == 400


def test_a_top_k_that_keeps_the_whole_vocabulary_truncates_nothing(gateway: AgentGateway) -> None:
    for top_k, exact in ((100_000, True), (2**30, True), (2**31 - 1, True), (5, False)):
        session = gateway.create_session()
        headers = {"Authorization": f"Bearer {session.api_key}"}
        body = {"model": "m", "max_tokens": 4, "messages": [HI], "top_k": top_k}
        address = f"{session.base_url}/chat/completions"
        answer = httpx.post(address, json=body, headers=headers, verify=False, timeout=30)
        assert answer.status_code == 200
        assert [leaf.exact_log_probs for leaf in gateway.trajectories(session.id)] == [exact]
    assert SamplingParams(top_k=2**30).top_k == -1
    assert SamplingParams(top_k=5).for_vocabulary(None).top_k == 5
