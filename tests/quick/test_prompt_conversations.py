"""Conversations with tools, of differing lengths, and with end tokens of other kinds."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory

from tests.tokenizers_made import CHATML, TOOLS, make_tokenizer
from torchrl_sglang import ConfigError, SGLangWrapper
from torchrl_sglang.chat.messages import read_conversation
from torchrl_sglang.chat.template import ChatTemplate
from torchrl_sglang.chat.turn import prepare_turn
from torchrl_sglang.chat_templates import ChatRenderer
from torchrl_sglang.rollout.incremental_tokens import continue_tokens
from torchrl_sglang.scores.transform import RewardModelTransform
from torchrl_sglang.testing.echo_pool import EchoPool

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ROUND = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
]
BEHIND_A_CALL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{% elif m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}"
    "{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Takes a tool's result behind a call only, and of a message with calls nothing but these."""


@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize("template", [TOOLS, BEHIND_A_CALL])
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_tokens_of_a_call_are_kept(template: str, rewritten: bool, rounds: int) -> None:
    tokenizer = make_tokenizer("byte-level", chat_template=template)
    renderer = ChatRenderer(tokenizer)
    talk = [*ROUND, {"role": "assistant", "content": "5."}, *ROUND][: len(ROUND) + 4 * (rounds - 1)]
    prompt = renderer.render(talk[:-2], add_generation_prompt=True)
    text = renderer.render(talk, add_generation_prompt=True)
    end = text.index("<|im_end|>", len(prompt))
    # One token per letter: not the tokens that the tokenizer would make of the whole.
    letters = [token for letter in text[len(prompt) : end] for token in renderer.encode(letter)]
    known = [*renderer.encode(prompt), *letters, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    end += len("<|im_end|>")
    expected = [*known, *renderer.encode(text[end:])]
    assert expected != renderer.encode(text)
    assert continue_tokens(known, talk, renderer, rewritten=rewritten) == expected


class Scorer:
    texts: list[Any]

    def get_scores(self, texts: list[Any], **_: Any) -> list[float]:
        self.texts = texts
        return list(map(float, range(len(texts))))


@pytest.mark.parametrize("copies", [1, 3])
def test_conversations_of_differing_lengths_are_scored(copies: int) -> None:
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
            {"role": "user", "content": "e"},
            {"role": "assistant", "content": "f"},
        ],
    ]
    scorer = Scorer()
    ragged = lazy_stack([History.from_chats([chat])[0] for chat in chats])
    for full in (ragged, History.from_chats(chats)):
        td = TensorDict(history=ChatHistory(full=full, batch_size=[2]), batch_size=[2])
        if copies > 1:
            td = lazy_stack([td] * copies)
        transform = RewardModelTransform(scorer)  # type: ignore[arg-type]
        out = transform._step(td, TensorDict(batch_size=td.batch_size))
        assert scorer.texts == chats * copies
        assert out["reward"].shape == (*td.batch_size, 1, 1)
        assert torch.equal(out["reward"].flatten(), torch.arange(2.0 * copies))


def test_an_end_token_need_not_be_special_but_a_line_break_is_none() -> None:
    end = tokenizers.AddedToken("<|turn_end|>", normalized=False, special=False)
    tokenizer = make_tokenizer("byte-level", chat_template=CHATML.replace("im_end", "turn_end"), more_tokens=(end,))
    expected = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|turn_end|>")}
    assert ChatRenderer(tokenizer).turn_end_ids() == set(ChatTemplate(tokenizer).turn_end_ids()) == expected
    line = tokenizers.AddedToken("\n", normalized=False, special=False)  # as Gemma's tokenizers have it
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = make_tokenizer("byte-level", chat_template=plain, more_tokens=(line,))
    assert ChatRenderer(tokenizer).turn_end_ids() == set(ChatTemplate(tokenizer).turn_end_ids()) == {2}


@pytest.mark.parametrize(
    "variables", [{"add_generation_prompt": False}, {"tokenize": True}, {"chat_template": "x"}, {"tools": []}, "abc"]
)
def test_a_chat_takes_variables_of_the_template_only(variables: Any) -> None:
    with pytest.raises(ConfigError, match="template_kwargs"):
        prepare_turn(
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            tools=None,
            adapter=None,
            return_log_probs=False,
            template_kwargs=variables,
            generation={},
        )


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}", "{{ messages[9].content.x }}"]
)
def test_an_error_of_any_kind_in_a_template_is_a_refusal(template: str) -> None:
    tokenizer = make_tokenizer("byte-level", chat_template=template)
    with pytest.raises(ConfigError, match="the chat template refuses the conversation"):
        ChatRenderer(tokenizer).render(ROUND, add_generation_prompt=True)
    with pytest.raises(ConfigError, match="the chat template refuses the conversation"):
        ChatTemplate(tokenizer).encode(read_conversation("hi"))


def test_an_answer_without_content_is_empty_and_a_call_without_arguments_has_none() -> None:
    calls = [{"id": "x", "type": "function", "function": {"name": "now", "arguments": given}} for given in ("", None)]
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm."},
        {"role": "assistant", "content": None, "tool_calls": [*calls, {"name": "now"}]},
    ]
    read = read_conversation(talk).messages
    assert (read[1]["content"], read[1]["reasoning_content"]) == ("", "Hm.")
    assert [call["function"] for call in read[2]["tool_calls"]] == [{"name": "now", "arguments": {}}] * 3


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": None},
        {"role": "assistant", "content": "", "tool_calls": ["now"]},
        {"role": "assistant", "content": "", "tool_calls": {"name": "now"}},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": "now"}]},
        {"role": "user", "content": [{"type": "input_audio"}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"format": "wav"}}]},
    ],
)
def test_a_malformed_message_is_named(message: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="message 1 has"):
        read_conversation([{"role": "user", "content": "hi"}, message])


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("bad", ["\ud83d", "b" * 5000])
def test_a_conversation_that_can_not_be_served_is_named_or_masked_alone(generate: bool, bad: str) -> None:
    tokenizer = make_tokenizer("byte-level")
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("b", bad)]
    name = "prompt" if generate else "full"
    td = TensorDict(history=ChatHistory(**{name: History.from_chats(chats)}, batch_size=[2]), batch_size=[2])
    settings: dict[str, Any] = {"tokenizer": tokenizer, "generate": generate}
    if generate:
        settings["generate_kwargs"] = {"max_new_tokens": 2}
    with pytest.raises(ConfigError, match="batch index 1|prompt 1"):
        SGLangWrapper(EchoPool(vocab_size=len(tokenizer)), **settings)(td.clone())
    out = SGLangWrapper(EchoPool(vocab_size=len(tokenizer)), on_error="mask", **settings)(td.clone())
    if generate:
        assert [bool(error) for error in out["generation"].error] == [False, True]
        return
    for kind in ("all_attention_mask", "all_assistant_mask"):
        first, second = out["masks"].get(kind, as_list=True)
        assert first.any()
        assert not second.any()
