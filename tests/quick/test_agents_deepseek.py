"""Templates in DeepSeek's manner: they write calls and results, and no tools; the prompt opens the thinking."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent_kit import Sampled, chat, check_parents, check_recorded, says, scripted, user
from tests.matrix.combinations import TOOLS
from tests.matrix.tokenizer_kinds import make_tokenizer

R1 = """\
{{- bos_token or '' -}}
{%- set ns = namespace(behind_result=false) -%}
{%- for m in messages if m.role == 'system' -%}{{ m.content }}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' and m.tool_calls -%}
{{ '<｜Assistant｜>' + (m.content or '') + '<｜tool▁calls▁begin｜>' }}
{%- for call in m.tool_calls -%}
{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' }}
{{- call.function.arguments | tojson }}{{ '\\n```<｜tool▁call▁end｜>' }}
{%- endfor -%}
{{ '<｜tool▁calls▁end｜>' + eos_token }}
{%- elif m.role == 'assistant' -%}
{{ '' if ns.behind_result else '<｜Assistant｜>' }}{{ m.content.split('</think>')[-1] + eos_token }}
{%- elif m.role == 'tool' -%}
{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- endif -%}
{%- set ns.behind_result = m.role == 'tool' -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.behind_result -%}{{ '<｜Assistant｜><think>\\n' }}{%- endif -%}"""
CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    '{"a":  1, "b": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


def run_talk(answers: list[Sampled], tokenizer: Any, **settings: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    """A conversation in which each call gets its result, and each other answer another question."""
    sessions, model = scripted(tokenizer, lambda _: answers.pop(0), **settings)

    async def ask(request: Any, *, timeout_s: float) -> Any:
        """As SGLang's parser answers."""
        assert request.body["tool_call_parser"] == "deepseekv3"
        text = request.body["text"]
        calls = [{"name": "add", "parameters": '{"a": 1, "b": 2}'}] if CALL in text else []
        return {"normal_text": text.replace(CALL, "").strip(), "calls": calls}

    model.ask = ask  # type: ignore[method-assign]
    session = sessions.create()
    talk: list[dict[str, Any]] = [user("one")]
    while answers:
        message = dict(chat(session, talk, tools=tuple(TOOLS)).choices[0].message)
        calls = message.get("tool_calls") or ()
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "5"} for call in calls]
        talk += [message, *(results or [user("more")])]
    check_recorded(session.trajectories(), model.calls)
    check_parents(session.trajectories(), session.info().sampled_tokens)
    return session, model, talk


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("byte-level BPE", R1)


def test_calls_in_the_models_own_form_are_read_and_their_tokens_kept(tokenizer: Any) -> None:
    said = [says(tokenizer, text, tokenizer.eos_token) for text in (f"Hm.\n</think>\n\n{CALL}", "It is 3.")]
    session, model, talk = run_talk(said, tokenizer, on_rewrite="keep")
    assert [len(message.get("tool_calls") or ()) for message in talk] == [0, 1, 0, 0, 0]
    assert talk[1]["reasoning_content"] == "Hm."
    assert len(session.trajectories()) == 1
    prompt = tokenizer.decode(list(model.calls[1][0]))
    assert prompt.endswith(f"{CALL}{tokenizer.eos_token}<｜tool▁output▁begin｜>5<｜tool▁output▁end｜>")
    assert "<tool_response>" not in prompt


def test_calls_in_the_form_that_the_prompt_asks_for_are_read_too(tokenizer: Any) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    said = [says(tokenizer, text, tokenizer.eos_token) for text in (f"Hm.\n</think>\n\n{call}", "It is 3.")]
    _, model, talk = run_talk(said, tokenizer)
    assert [len(message.get("tool_calls") or ()) for message in talk] == [0, 1, 0, 0, 0]
    assert "<tool_call>" in tokenizer.decode(list(model.calls[0][0]))


@pytest.mark.parametrize(("on_rewrite", "leaves"), [("branch", 2), ("keep", 1)])
def test_thinking_that_the_template_leaves_out_later_begins_a_branch(
    tokenizer: Any, on_rewrite: Any, leaves: int
) -> None:
    said = [says(tokenizer, text, tokenizer.eos_token) for text in ("Hm.\n</think>\n\nYes.", "Ho.\n</think>\n\nNo.")]
    session, *_ = run_talk(said, tokenizer, on_rewrite=on_rewrite)
    assert len(session.trajectories()) == leaves


@pytest.mark.parametrize("end", [{"finish_reason": "length"}, {"matched": "END"}])
def test_an_answer_that_ends_in_its_thinking_has_no_content(tokenizer: Any, end: dict[str, Any]) -> None:
    ids = tuple(tokenizer("Hm and END", add_special_tokens=False)["input_ids"])
    sessions, model = scripted(tokenizer, lambda _: Sampled(ids, **end))
    session = sessions.create()
    message = chat(session, [user("q")], sampling={"stop": ["END"]}).choices[0].message
    assert message["content"] == ""
    assert message["reasoning_content"].startswith("Hm and")
    chat(session, [user("q"), message, user("go on")])
    check_recorded(session.trajectories(), model.calls)
