"""Prompts of an agent's later turns: sampled tokens are kept, the rest is what the chat template makes of it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tests.agent_kit import Sampled, chat, run, says, scripted, user
from tests.matrix.combinations import TOOLS, pairs
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from tests.quick.agent_templates import CALL, QWEN3
from torchrl_sglang.agents.types import Progress, TextRequest

ALL = pytest.mark.parametrize(("kind", "name"), [pytest.param(*pair, id=" x ".join(pair)) for pair in pairs()])


def own_ids(tokenizer: Any, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
    """The prompt as transformers makes it."""
    options = {"add_generation_prompt": True, "return_dict": False}
    ids: list[int] = tokenizer.apply_chat_template(messages, **options, **variables)
    return ids


def replay(tokenizer: Any, answers: list[Sampled], **settings: Any) -> Any:
    """Sessions whose model gives these answers in turn."""
    waiting = list(answers)
    return scripted(tokenizer, lambda _: waiting.pop(0), **settings)


def rendered_answer(tokenizer: Any, messages: list[dict[str, Any]], text: str, end: str) -> Sampled:
    """The answer in the tokens that the rendered conversation has for it, up to the token that ends it."""
    answered = [*messages, {"role": "assistant", "content": text}]
    whole = tokenizer.apply_chat_template(answered, return_dict=False)
    start, last = len(own_ids(tokenizer, messages)), tokenizer.convert_tokens_to_ids(end)
    return Sampled(tuple(whole[start : whole.index(last, start) + 1]), matched=last)


@ALL
def test_a_conversation_is_one_sequence_and_each_prompt_is_the_templates(kind: str, name: str) -> None:
    template = TEMPLATES[name]
    tokenizer = make_tokenizer(kind, template.source)
    end = template.end or tokenizer.eos_token
    answers: list[Sampled] = []
    sessions, model = scripted(tokenizer, lambda _: answers[-1])
    session = sessions.create()
    messages = [user("what is 2 + 3?")]
    for text in ("it is 5.", "the dog", "hello world!"):
        answers.append(rendered_answer(tokenizer, messages, text, end))
        turn = chat(session, messages)
        assert list(model.calls[-1][0]) == own_ids(tokenizer, messages)
        assert turn.choices[0].message["content"].strip() == text
        messages += [{"role": "assistant", "content": text}, user("and then?")]
    (trajectory,) = session.trajectories()
    assert sum(trajectory.loss_mask) == sum(len(answer.ids) for answer in answers)
    assert trajectory.parent is None


def test_thinking_and_spelling_are_kept_in_a_tool_loop_and_a_new_question_begins_a_branch() -> None:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    texts = [
        f"<think>\nadd them\n</think>\n\n{CALL}",
        f"<think>again</think>{CALL}",
        "<think>\ndone\n</think>\n\nIt is 5.",
        "Bye.",
    ]
    sessions, model = replay(tokenizer, [says(tokenizer, text, "<|im_end|>") for text in texts])
    session = sessions.create()
    messages = [user("What is 2 + 3?")]
    for _ in range(2):
        turn = chat(session, messages, tools=tuple(TOOLS))
        message = copy.deepcopy(dict(turn.choices[0].message))
        assert turn.choices[0].finish_reason == "tool_calls"
        assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": 2, "b": 3}
        message.pop("reasoning_content")  # as clients do
        messages += [message, {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "5"}]
    turn = chat(session, messages, tools=tuple(TOOLS))
    assert turn.choices[0].message == {"role": "assistant", "content": "It is 5.", "reasoning_content": "done"}
    (whole,) = session.trajectories()
    sampled = [token for token, masked in zip(whole.token_ids, whole.loss_mask, strict=True) if masked]
    assert sampled == [i for text in texts[:3] for i in says(tokenizer, text, "<|im_end|>").ids]
    # A new question: the template leaves out the thinking of all answers before it.
    messages += [{"role": "assistant", "content": "It is 5."}, user("Bye")]
    chat(session, messages, tools=tuple(TOOLS))
    first, second = session.trajectories()
    assert first.token_ids == whole.token_ids
    assert (second.parent, second.shared_tokens) == (0, 0)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    calls = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "5"}]
    stripped = [user("What is 2 + 3?"), *calls, *calls, {"role": "assistant", "content": "It is 5."}, user("Bye")]
    prompt = tuple(own_ids(tokenizer, stripped, tools=TOOLS))
    written = tokenizer.decode(prompt).replace('{"a": 2, "b": 3}', '{"b": 3, "a": 2}')
    assert tokenizer.decode(model.calls[-1][0]) == written
    assert sum(second.loss_mask) == len(says(tokenizer, "Bye.", "<|im_end|>").ids)


def test_thinking_is_kept_if_the_setting_says_so() -> None:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    answers = [says(tokenizer, text, "<|im_end|>") for text in ("<think>\nhm\n</think>\n\nYes.", "No.")]
    sessions, model = replay(tokenizer, answers, on_rewrite="keep")
    session = sessions.create()
    turn = chat(session, [user("dog")])
    chat(session, [user("dog"), turn.choices[0].message, user("fox")])
    assert len(session.trajectories()) == 1
    assert model.calls[1][0][len(model.calls[0][0]) :][: len(answers[0].ids)] == answers[0].ids


def test_tokens_before_a_rewritten_answer_are_kept() -> None:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    texts = ["Yes.", "<think>\nhm\n</think>\n\nNo.", "Well."]
    answers = [says(tokenizer, text, "<|im_end|>") for text in texts]
    # the first one in tokens of its own: "Ye" and "s." are spelled letter by letter
    letters = [i for letter in "Yes." for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    answers[0] = Sampled((*letters, answers[0].ids[-1]), matched=answers[0].ids[-1])
    sessions, model = replay(tokenizer, answers)
    session = sessions.create()
    messages = [user("one")]
    for question in ("two", "three", ""):
        turn = chat(session, messages)
        messages += [dict(turn.choices[0].message), user(question)]
    first, second = session.trajectories()
    start = len(model.calls[0][0]) + len(answers[0].ids)
    assert (second.parent, second.shared_tokens) == (0, start)
    assert second.token_ids[:start] == first.token_ids[:start]
    assert list(second.own_mask) == [0] * len(model.calls[2][0]) + [1] * len(answers[2].ids)
    assert tokenizer.decode(model.calls[2][0]) == tokenizer.decode(
        own_ids(tokenizer, [user("one"), {"role": "assistant", "content": "Yes."}, user("two"),
                            {"role": "assistant", "content": "No."}, user("three")])
    )  # fmt: skip


@pytest.mark.parametrize("template", [QWEN3, TEMPLATES["ChatML"].source], ids=["Qwen3", "ChatML"])
def test_an_edited_answer_is_text_of_the_prompt_and_not_trained_on(template: str) -> None:
    tokenizer = make_tokenizer("byte-level BPE", template)
    answers = [says(tokenizer, text, "<|im_end|>") for text in ("It is 5.", "It is 6.", "Yes.")]
    sessions, model = replay(tokenizer, answers)
    session = sessions.create()
    talk = [user("2 + 3?"), dict(chat(session, [user("2 + 3?")]).choices[0].message), user("sure?")]
    talk.append(dict(chat(session, talk).choices[0].message))
    edited = [*talk[:3], {"role": "assistant", "content": "It is 7."}, user("really?")]
    chat(session, edited)
    _, second = session.trajectories()
    assert list(model.calls[-1][0]) == own_ids(tokenizer, edited)
    assert second.parent == 0
    assert second.shared_tokens == len(model.calls[0][0]) + len(answers[0].ids)
    assert sum(second.loss_mask) == len(answers[0].ids) + len(answers[2].ids)
    assert sum(second.own_mask) == len(answers[2].ids)


def test_tools_that_change_begin_another_sequence() -> None:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    sessions, model = replay(tokenizer, [says(tokenizer, text, "<|im_end|>") for text in ("Yes.", "No.")])
    session = sessions.create()
    turn = chat(session, [user("dog")])
    chat(session, [user("dog"), turn.choices[0].message, user("fox")], tools=tuple(TOOLS))
    _, second = session.trajectories()
    assert (second.parent, second.shared_tokens) == (0, 0)
    assert list(model.calls[1][0]) == own_ids(
        tokenizer, [user("dog"), {"role": "assistant", "content": "Yes."}, user("fox")], tools=TOOLS
    )


def test_a_prompt_that_opens_the_thinking_has_the_thinking_read_from_the_answer() -> None:
    opened = TEMPLATES["ChatML"].source.replace(
        "assistant\\n' }}{%- endif -%}", "assistant\\n<think>\\n' }}{%- endif -%}"
    )
    tokenizer = make_tokenizer("byte-level BPE", opened)
    sessions, _ = replay(tokenizer, [says(tokenizer, "hm\n</think>\n\nYes.", "<|im_end|>"), says(tokenizer, "x", None)])
    session = sessions.create()
    reports: list[Any] = []
    turn = chat(session, [user("dog")], reports.append)
    assert turn.choices[0].message == {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}
    assert Progress.joined(reports).reasoning_content == "hm"
    # The template writes contents as they are: the thinking is put back, and the tokens are kept.
    cut = chat(session, [user("dog"), {"role": "assistant", "content": "Yes."}, user("fox")])
    assert len(session.trajectories()) == 1
    assert (cut.choices[0].message.get("reasoning_content"), cut.choices[0].finish_reason) == ("x", "length")


def test_a_stop_string_is_trimmed_from_the_message_and_kept_in_the_tokens() -> None:
    tokenizer = make_tokenizer("byte-level BPE", TEMPLATES["ChatML"].source)
    ids = tuple(tokenizer("Act: look\nObservation:", add_special_tokens=False)["input_ids"])
    sessions, model = replay(tokenizer, [Sampled(ids, matched="\nObservation:"), says(tokenizer, "No.", "<|im_end|>")])
    session = sessions.create()
    turn = chat(session, [user("go")], sampling={"stop": ["\nObservation:"]})
    assert (turn.choices[0].message["content"], turn.choices[0].stop) == ("Act: look", "\nObservation:")
    chat(session, [user("go"), turn.choices[0].message, user("a door")])
    assert len(session.trajectories()) == 1
    assert tokenizer.decode(model.calls[1][0]).endswith(
        "Act: look\nObservation:<|im_end|>\n<|im_start|>user\na door<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece BPE with prefix space"])
def test_a_template_without_tools_gets_them_as_text(kind: str) -> None:
    template = TEMPLATES["model role"]  # knows neither tools nor a role for results, and wants roles to alternate
    tokenizer = make_tokenizer(kind, template.source)
    answers = [says(tokenizer, text, template.end) for text in (f"{CALL}\n{CALL}", "It is 5.")]
    sessions, model = replay(tokenizer, answers)
    session = sessions.create()
    turn = chat(session, [user("2 + 3?")], tools=tuple(TOOLS))
    message = dict(turn.choices[0].message)
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "5"} for call in message["tool_calls"]]
    assert len(results) == 2
    chat(session, [user("2 + 3?"), message, *results], tools=tuple(TOOLS))
    assert len(session.trajectories()) == 1
    text = tokenizer.decode(model.calls[1][0])
    assert text.count('"name": "add"') >= 1
    assert text.count("<tool_response>") == 2


def test_a_text_that_goes_on_from_an_answer_keeps_its_tokens() -> None:
    tokenizer = make_tokenizer("byte-level BPE")
    tokenizer.chat_template = TEMPLATES["ChatML"].source
    sessions, model = replay(tokenizer, [says(tokenizer, " a time", None), says(tokenizer, ".", None)] * 2)
    session = sessions.create()

    def complete(prompt: Any) -> Any:
        return run(session.complete(TextRequest(prompt=prompt)))

    first = complete("Once upon").choices[0]
    complete(f"Once upon{first.text} there was")
    (trajectory,) = session.trajectories()
    assert tokenizer.decode(trajectory.token_ids) == "Once upon a time there was."
    assert sum(trajectory.loss_mask) == len(first.token_ids) + 1
    ids = (*model.calls[0][0], 7)
    complete(ids)
    assert model.calls[-1][0] == ids
    other = session.trajectories()[1]
    assert other.parent is None


def test_a_system_message_goes_into_the_first_question_of_a_template_that_refuses_it() -> None:
    template = TEMPLATES["words"]
    tokenizer = make_tokenizer("byte-level BPE with one special token", template.source)
    answers = [says(tokenizer, " Yes.", tokenizer.eos_token)] * 2
    sessions, model = replay(tokenizer, answers)
    session = sessions.create()
    talk: list[Any] = [{"role": "system", "content": "Be brief."}, user("dog")]
    talk += [chat(session, talk).choices[0].message, user("fox")]
    chat(session, talk)
    assert tokenizer.decode(model.calls[0][0]) == "User: Be brief.\n\ndog\nAssistant:"
    assert len(session.trajectories()) == 1
    assert session.trajectories()[0].messages[0] == {"role": "system", "content": "Be brief."}
