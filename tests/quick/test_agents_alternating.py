"""Conversations whose roles do not alternate, for templates that refuse them: Mistral's and Gemma's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent_kit import chat, check_parents, check_recorded, says, scripted, user
from tests.matrix.combinations import TOOLS
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang.errors import ConfigError

MISTRAL = TEMPLATES["alternating"].source
GEMMA = TEMPLATES["model role"].source
CALL = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "%s"}]'


def assistant(text: str | None, *ids: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    message: dict[str, Any] = {"role": "assistant", "content": text}
    return {**message, "tool_calls": [{**call, "id": each} for each in ids]} if ids else message


def result(call_id: str, text: str = "5") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def sent(source: str, messages: list[dict[str, Any]]) -> str:
    tokenizer = make_tokenizer("byte-level BPE", source)
    sessions, model = scripted(tokenizer, lambda _: says(tokenizer, "ok", tokenizer.eos_token))
    chat(sessions.create(), messages)
    return str(tokenizer.decode(list(model.calls[0][0]))).removeprefix(tokenizer.bos_token or "")


ID = "abcdefgh1"
REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    (  # a result, then a user: an answer of no words ends the turn, as if the model had said nothing
        [user("one"), assistant(None, ID), result(ID), user("two")],
        "[INST] one[/INST]" + CALL % ID + "</s>[TOOL_RESULTS] " + '{"content": 5, "call_id": "' + ID + '"} </s>'
        "[INST] two[/INST]",
    ),
    (
        [user("one"), assistant(None, ID), result(ID), user("two"), user("three")],
        "[INST] one[/INST]" + CALL % ID + "</s>[TOOL_RESULTS] " + '{"content": 5, "call_id": "' + ID + '"} </s>'
        "[INST] two\n\nthree[/INST]",
    ),
    (  # a call that was cancelled
        [user("one"), assistant(None, ID), user("stop")],
        "[INST] one[/INST]" + CALL % ID + "</s> </s>[INST] stop[/INST]",
    ),
    (  # a greeting comes first
        [assistant("Hello!"), user("one")],
        "[INST] [/INST] Hello!</s>[INST] one[/INST]",
    ),
    (  # an answer in two messages
        [user("one"), assistant("x"), assistant("y"), user("two")],
        "[INST] one[/INST] x\n\ny</s>[INST] two[/INST]",
    ),
]


@pytest.mark.parametrize(("messages", "text"), REFUSED)
def test_mistrals_template_gets_a_form_that_it_takes(messages: list[dict[str, Any]], text: str) -> None:
    eos = str(make_tokenizer("byte-level BPE", MISTRAL).eos_token)
    assert sent(MISTRAL, messages) == text.replace("</s>", eos)


def test_gemmas_template_gets_a_users_message_before_a_greeting() -> None:
    written = sent(GEMMA, [{"role": "system", "content": "S"}, assistant("Hello!"), user("one")])
    assert written.endswith(
        "<start_of_turn>model\nHello!<end_of_turn>\n<start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\n"
    )
    assert written.startswith("<start_of_turn>user\nS")


def test_sampled_tokens_are_kept_where_a_user_speaks_behind_a_tools_result() -> None:
    tokenizer = make_tokenizer("byte-level BPE", MISTRAL)
    call = '[TOOL_CALLS] [{"name": "add", "arguments": {"a":  1}}]'
    answers = [says(tokenizer, text, tokenizer.eos_token) for text in (call, "Well then.", "Yes.")]
    sessions, model = scripted(tokenizer, lambda _: answers.pop(0))
    session = sessions.create()
    talk: list[Any] = [user("one")]
    for new in ([user("two")], [user("three")], []):
        turn = chat(session, talk, tools=tuple(TOOLS))
        message = turn.choices[0].message
        results = [result(each["id"]) for each in message.get("tool_calls") or ()]
        talk += [message, *results, *new]
    assert [len(m.get("tool_calls") or ()) for m in talk if m["role"] == "assistant"] == [1, 0, 0]
    check_recorded(session.trajectories(), model.calls)
    check_parents(session.trajectories(), session.info().sampled_tokens)


@pytest.mark.parametrize("on_rewrite", ["branch", "keep"])
def test_what_the_client_adds_behind_an_answer_is_in_the_prompt(on_rewrite: str) -> None:
    tokenizer = make_tokenizer("byte-level BPE", MISTRAL)
    sessions, model = scripted(tokenizer, lambda _: says(tokenizer, "Yes.", tokenizer.eos_token), on_rewrite=on_rewrite)
    session = sessions.create()
    answer = chat(session, [user("one")]).choices[0].message
    chat(session, [user("one"), answer, assistant("And no."), user("two")])
    prompt = str(tokenizer.decode(list(model.calls[1][0]))).replace(str(tokenizer.eos_token), "</s>")
    assert prompt.endswith("[INST] one[/INST] Yes.\n\nAnd no.</s>[INST] two[/INST]")
    check_recorded(session.trajectories(), model.calls)


def test_what_no_form_helps_is_refused_in_the_templates_words() -> None:
    strict = (
        "{%- for m in messages -%}{%- if m.content is string and 'bad' in m.content -%}"
        "{{ raise_exception('no bad words') }}{%- endif -%}{{ m.role }}:{{ m.content }};{%- endfor -%}"
    )
    with pytest.raises(ConfigError, match="no bad words"):
        sent(strict, [user("bad")])
