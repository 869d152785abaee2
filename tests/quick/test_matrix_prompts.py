"""Every tokenizer kind with every chat template: the prompt is the tokenizer's own, and later turns keep the tokens.

The correct value is always ``tokenizer.apply_chat_template``. What needs a server is in ``tests/matrix/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Text

from tests.matrix.combinations import NEXT, TOOLS, conversations, pairs
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang import SamplingParams, SGLangWrapper
from torchrl_sglang.chat.messages import read_conversation
from torchrl_sglang.chat.template import ChatTemplate
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.testing import EchoPool

ALL = pytest.mark.parametrize(("kind", "template"), [pytest.param(*pair, id=" x ".join(pair)) for pair in pairs()])


class ScriptedPool(EchoPool):
    """Answers every prompt with the same tokens."""

    def __init__(self, output_ids: Sequence[int], *, finish_reason: str) -> None:
        super().__init__(vocab_size=1000)
        self.output_ids, self.finish_reason = list(output_ids), finish_reason

    def _answer(self, ids_T: Sequence[int], sampling: SamplingParams, **requested: bool) -> GenerateReply:
        stopped = self.finish_reason == "stop"
        return replace(
            super()._answer(ids_T, sampling, **requested),
            output_ids=self.output_ids,
            output_logprobs=[-1.0] * len(self.output_ids),
            completion_tokens=len(self.output_ids),
            finish_reason=self.finish_reason,
            matched=self.output_ids[-1] if stopped else None,
        )


def own_ids(tokenizer: Any, chat: Sequence[Any], **options: Any) -> list[int]:
    """The prompt as transformers makes it."""
    ids: list[int] = tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=False, **options)
    return ids


def as_prompt(chat: Sequence[Any]) -> TensorDict:
    """A TensorDict with the conversation, without the id and name in a tool's result: a History has no field for them.

    The policy fills in the id of the call that was answered.
    """
    messages = [{key: value for key, value in one.items() if key not in ("tool_call_id", "name")} for one in chat]
    return TensorDict(history=ChatHistory(prompt=History.from_chats([messages]), batch_size=[1]), batch_size=[1])


def end_token(template: str, tokenizer: Any) -> int:
    end = TEMPLATES[template].end
    return int(tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end))


@ALL
def test_a_chat_sends_the_tokenizers_own_prompt(kind: str, template: str) -> None:
    tokenizer = make_tokenizer(kind, TEMPLATES[template].source)
    chat_template = ChatTemplate(tokenizer)
    for name, chat in conversations(TEMPLATES[template]).items():
        assert chat_template.encode(read_conversation(chat)) == own_ids(tokenizer, chat), name
        for variable, value in TEMPLATES[template].variables.items():
            expected = own_ids(tokenizer, chat, **{variable: value})
            assert chat_template.encode(read_conversation(chat), extra={variable: value}) == expected, name
            assert expected != own_ids(tokenizer, chat)
        if TEMPLATES[template].has_tools:
            expected = own_ids(tokenizer, chat, tools=TOOLS)
            assert chat_template.encode(read_conversation(chat), TOOLS) == expected, name
    assert end_token(template, tokenizer) in chat_template.turn_end_ids()


@ALL
def test_a_policy_sends_the_tokenizers_own_prompt(kind: str, template: str) -> None:
    tokenizer = make_tokenizer(kind, TEMPLATES[template].source)
    pool = EchoPool(vocab_size=1000)
    policy = SGLangWrapper(
        pool,
        tokenizer=tokenizer,
        input_mode="history",
        generate_kwargs={"max_new_tokens": 2, "ignore_eos": True},
    )
    for name, chat in conversations(TEMPLATES[template]).items():
        td = policy(as_prompt(chat))
        expected = own_ids(tokenizer, chat)
        assert pool.requests[-1] == [expected], name
        assert td["tokens", "prompt"][0].tolist() == expected
        assert td["text", "prompt"][0] == tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )
        variables = dict(TEMPLATES[template].variables)
        if TEMPLATES[template].has_tools:
            variables["tools"] = TOOLS
        policy(as_prompt(chat), template_kwargs=variables)
        assert pool.requests[-1] == [own_ids(tokenizer, chat, **variables)], name


@ALL
def test_rendered_text_gets_special_tokens_once_in_text_mode(kind: str, template: str) -> None:
    tokenizer = make_tokenizer(kind, TEMPLATES[template].source)
    pool = EchoPool(vocab_size=1000)
    policy = SGLangWrapper(
        pool, tokenizer=tokenizer, input_mode="text", generate_kwargs={"max_new_tokens": 2, "ignore_eos": True}
    )
    [chat, *_] = conversations(TEMPLATES[template]).values()
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    policy(TensorDict(text=Text(prompt=[text, "the dog"], batch_size=[2]), batch_size=[2]))
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    expected = own_ids(tokenizer, chat) if begins else tokenizer(text)["input_ids"]
    assert pool.requests[-1] == [expected, tokenizer("the dog")["input_ids"]]


@ALL
@pytest.mark.parametrize("ends", ["at its end token", "at the length limit"])
def test_a_second_turn_keeps_the_first_turns_tokens(kind: str, template: str, ends: str) -> None:
    tokenizer = make_tokenizer(kind, TEMPLATES[template].source)
    answer = tokenizer("the dog is Paris", add_special_tokens=False)["input_ids"]
    if len(answer) > 4:  # other tokens than those that the text would get
        answer = [*tokenizer("the d", add_special_tokens=False)["input_ids"], *answer[-3:]]
    stops = ends == "at its end token"
    pool = ScriptedPool(
        [*answer, end_token(template, tokenizer)] if stops else answer, finish_reason="stop" if stops else "length"
    )
    policy = SGLangWrapper(
        pool,
        tokenizer=tokenizer,
        input_mode="history",
        generate_kwargs={"max_new_tokens": 20},
        prefer_tokens=True,
    )
    chat = conversations(TEMPLATES[template])["a second question"]
    td = policy(as_prompt(chat))
    first = [*pool.requests[-1][0], *pool.output_ids]
    said = td["history", "full"][0, -1].content
    assert td["tokens", "full"][0].tolist() == first

    history = td["history", "full"].append(History.from_chats([[NEXT]])[:, 0], inplace=False, dim=-1)
    follow_up = TensorDict(history=ChatHistory(prompt=history, batch_size=[1]), batch_size=[1])
    follow_up["tokens"] = td["tokens"]
    policy(follow_up)
    [second] = pool.requests[-1]
    assert second[: len(first)] == first, "the first turn was tokenized again"
    whole = own_ids(tokenizer, [*chat, {"role": "assistant", "content": said}, NEXT])
    added = second[len(first) :]
    assert len(added) > 3
    assert whole[-len(added) :] == added
    written, expected = ("".join(tokenizer.decode(ids).split()) for ids in (second, whole))
    assert written == expected, "something between the answer and the added part is missing or written twice"
