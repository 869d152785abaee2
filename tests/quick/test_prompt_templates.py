"""A conversation becomes exactly what ``tokenizer.apply_chat_template`` gives, whatever the tokenizer is called."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.data.llm.history import ContentBase
from torchrl.modules.llm.policies import ChatHistory

from tests.tokenizers_made import CHATML, INST, KINDS, THINKING, TOOLS, make_tokenizer
from torchrl_sglang import ConfigError, SGLangWrapper
from torchrl_sglang.chat.messages import read_conversation
from torchrl_sglang.chat.template import ChatTemplate
from torchrl_sglang.chat_templates import ChatRenderer
from torchrl_sglang.rollout.messages import history_messages
from torchrl_sglang.testing.echo_pool import EchoPool

TALK = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5, of course."},
    {"role": "user", "content": "The capital of France?"},
]
ANSWERED = [*TALK, {"role": "assistant", "content": "Paris."}]
SCHEMA = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def rows(td: Any, *key: str) -> list[Any]:
    return list(td.get(key, as_list=True))


def sent(tokenizer: Any, *chats: list[dict[str, Any]], call: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """The ids that the pool gets, and the output."""
    pool = EchoPool(vocab_size=len(tokenizer))
    name = "prompt" if kwargs.get("generate", True) else "full"
    td = TensorDict(history=ChatHistory(**{name: History.from_chats(list(chats))}, batch_size=[1]), batch_size=[1])
    settings = {"generate_kwargs": {"max_new_tokens": 2}} if name == "prompt" else {}
    out = SGLangWrapper(pool, tokenizer=tokenizer, input_mode="history", **settings, **kwargs)(td, **(call or {}))
    return pool.requests[0], out


def own(tokenizer: Any, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, return_dict=False, **kwargs))


@pytest.mark.parametrize("name", ["", "org/llama-7b", "qwen/other", "x/deepseek-falcon"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_is_the_tokenizers_own_whatever_its_name(kind: Any, name: str) -> None:
    for template in (CHATML, THINKING, INST):
        if kind == "wordpiece" and template is INST:
            continue
        tokenizer = make_tokenizer(kind, chat_template=template)
        tokenizer.name_or_path = name
        ids, out = sent(tokenizer, TALK)
        assert ids == [own(tokenizer, TALK, add_generation_prompt=True)]
        assert list(out["text"].prompt) == [
            tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
        ]
        ids, out = sent(tokenizer, ANSWERED, generate=False)
        assert ids == [own(tokenizer, ANSWERED)]
        assert rows(out, "tokens", "full")[0].tolist() == ids[0]


def test_variables_reach_the_template_in_generation_scoring_and_single_calls() -> None:
    tokenizer = make_tokenizer("byte-level", chat_template=THINKING)
    expected = own(tokenizer, TALK, add_generation_prompt=True, enable_thinking=False)
    assert expected != own(tokenizer, TALK, add_generation_prompt=True)
    off = {"enable_thinking": False}
    assert sent(tokenizer, TALK, template_kwargs=off)[0] == [expected]
    assert sent(tokenizer, TALK, call={"template_kwargs": off})[0] == [expected]
    assert sent(tokenizer, TALK, template_kwargs={"enable_thinking": True}, call={"template_kwargs": off})[0] == [
        expected
    ]
    tokenizer = make_tokenizer("byte-level", chat_template=TOOLS)
    for generate in (True, False):
        ids, _ = sent(tokenizer, ANSWERED, generate=generate, template_kwargs={"tools": [SCHEMA]})
        assert ids == [own(tokenizer, ANSWERED, add_generation_prompt=generate, tools=[SCHEMA])]
    policy = SGLangWrapper(EchoPool(), tokenizer=tokenizer, template_kwargs={"tools": [SCHEMA]})
    assert policy.get_new_version(generate=False).template_kwargs == {"tools": [SCHEMA]}


def test_variables_that_can_not_be_honoured_are_refused() -> None:
    tokenizer = make_tokenizer("byte-level")
    with pytest.raises(ConfigError, match=r"template_kwargs\['add_generation_prompt'\]"):
        SGLangWrapper(EchoPool(), tokenizer=tokenizer, template_kwargs={"add_generation_prompt": False})
    with pytest.raises(ConfigError, match="must map names"):
        SGLangWrapper(EchoPool(), tokenizer=tokenizer, template_kwargs=["tools"])
    policy = SGLangWrapper(EchoPool(), tokenizer=tokenizer, input_mode="text")
    with pytest.raises(ConfigError, match="no chat template in text mode"):
        policy(TensorDict({("text", "prompt"): "x"}, batch_size=1), template_kwargs={"a": 1})


def test_the_template_can_be_given_or_named_and_its_absence_is_told() -> None:
    tokenizer = make_tokenizer("byte-level", chat_template=None)
    with pytest.raises(ConfigError, match="no chat template.*pass chat_template="):
        sent(tokenizer, TALK)
    expected = own(tokenizer, TALK, chat_template=THINKING, add_generation_prompt=True)
    assert sent(tokenizer, TALK, chat_template=THINKING)[0] == [expected]
    theirs = History.from_chats(TALK).apply_chat_template(tokenizer=tokenizer, chat_template_name="qwen")
    assert sent(tokenizer, TALK, chat_template_name="qwen")[0] == [
        tokenizer(theirs, add_special_tokens=False)["input_ids"]
    ]
    with pytest.raises(ConfigError, match="chat_template_name='qwin' is no template"):
        sent(tokenizer, TALK, chat_template_name="qwin")
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLS, "brief": "{{ messages[-1].content }}"}
    assert sent(tokenizer, TALK)[0] == [own(tokenizer, TALK, add_generation_prompt=True, chat_template=CHATML)]
    with_tools = own(tokenizer, TALK, add_generation_prompt=True, tools=[SCHEMA])
    assert sent(tokenizer, TALK, template_kwargs={"tools": [SCHEMA]})[0] == [with_tools]
    assert "Tools:" in tokenizer.decode(with_tools)
    assert sent(tokenizer, TALK, chat_template_name="brief")[0] == [
        tokenizer("The capital of France?", add_special_tokens=False)["input_ids"]
    ]


def test_messages_have_their_own_fields_only() -> None:
    calls = [{"id": "abcdefghi", **CALL}]
    history = History.from_chats(
        [[TALK[0], {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "3"}]]
    )[0]
    assert history_messages(history) == [
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "abcdefghi"},
    ]
    dense = History(role=[["user", "<none>"]], content=[["a", ""]], tool_calls=[[None, []]], batch_size=(1, 2))[0]
    assert history_messages(dense) == [{"role": "user", "content": "a"}]
    parts = History.from_chats([{"role": "user", "content": ContentBase(type="text", text="hey")}])
    assert history_messages(parts) == [{"role": "user", "content": [{"type": "text", "text": "hey"}]}]


def test_a_template_that_requires_call_ids_gets_them() -> None:
    tokenizer = make_tokenizer("byte-level", chat_template=TOOLS)
    talk = [
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
    ]
    text = tokenizer.decode(sent(tokenizer, talk)[0][0])
    first, second = (text.split("</tool_call>")[i].split()[-1] for i in (0, 1))
    assert len(first) == len(second) == 9
    assert first != second
    assert f"{first}: 3" in text
    assert f"{second}: 4" in text
    assert tokenizer.decode(ChatTemplate(tokenizer).encode(read_conversation(talk))) == text
    given = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **CALL}]}]
    assert sent(tokenizer, given)[0] == [own(tokenizer, given, add_generation_prompt=True)]


# ------------------------------------------------------------------------------------------------- assistant masks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHATML, THINKING, INST], ids=["chatml", "thinking", "inst"])
def test_the_assistants_tokens_are_found_without_generation_tags(kind: Any, template: str) -> None:
    if kind == "wordpiece" and template is INST:
        pytest.skip("its template needs BOS and EOS")
    tokenizer = make_tokenizer(kind, chat_template=template)
    thinking = "<think>hm, 2 + 3</think>5, of course."
    talk = [TALK[0], {"role": "assistant", "content": thinking}, *ANSWERED[2:]]
    _, out = sent(tokenizer, talk, generate=False)
    mask = rows(out, "masks", "all_assistant_mask")[0]
    full = rows(out, "tokens", "full")[0]
    assert full.tolist() == own(tokenizer, talk)
    parts, inside = [], False
    for token, written in zip(full.tolist(), mask.tolist(), strict=True):
        if written and not inside:
            parts.append([])
        if written:
            parts[-1].append(token)
        inside = written
    first = "5, of course." if template is THINKING else thinking
    expected = [first, "Paris."]
    if kind == "wordpiece":
        expected = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in expected]
    assert [tokenizer.decode(part).strip() for part in parts] == expected


def test_generation_tags_decide_where_a_template_has_them() -> None:
    tagged = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    for kind in KINDS:
        tokenizer = make_tokenizer(kind, chat_template=tagged)
        reference = tokenizer.apply_chat_template(ANSWERED, return_dict=True, return_assistant_tokens_mask=True)
        _, out = sent(tokenizer, ANSWERED, generate=False)
        assert rows(out, "masks", "all_assistant_mask")[0].tolist() == [bool(m) for m in reference["assistant_masks"]]
        assert rows(out, "tokens", "full")[0].tolist() == reference["input_ids"]


def test_tool_calls_count_as_written_by_the_assistant() -> None:
    tokenizer = make_tokenizer("byte-level", chat_template=TOOLS)
    talk = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **CALL}]}]
    _, out = sent(tokenizer, talk, generate=False)
    full, mask = rows(out, "tokens", "full")[0], rows(out, "masks", "all_assistant_mask")[0]
    assert tokenizer.decode(full[mask]) == '<tool_call>add {"a": 1, "b": 2} abcdefghi</tool_call>'


def test_a_mask_that_can_not_be_found_is_left_out_with_a_warning() -> None:
    tokenizer = make_tokenizer("byte-level", chat_template="{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.warns(UserWarning, match="batch index 0.*which tokens the assistant wrote"):
        _, out = sent(tokenizer, ANSWERED, generate=False)
    assert out["masks"].all_assistant_mask is None
    assert rows(out, "masks", "all_attention_mask")[0].all()


def test_a_slow_tokenizer_has_masks_too() -> None:
    class Slow:
        """A tokenizer without offsets."""

        is_fast = False

        def __init__(self, fast: Any) -> None:
            self._fast = fast

        def __getattr__(self, name: str) -> Any:
            return getattr(self._fast, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            assert "return_offsets_mapping" not in kwargs
            return self._fast(*args, **kwargs)

    for kind in ("byte-level", "sentencepiece"):
        fast = make_tokenizer(kind)
        text = fast.apply_chat_template(ANSWERED, tokenize=False)
        assert ChatRenderer(Slow(fast)).assistant_mask(ANSWERED, text) == ChatRenderer(fast).assistant_mask(
            ANSWERED, text
        )


def test_an_added_token_beyond_the_served_vocabulary_is_named() -> None:
    tokenizer = make_tokenizer("byte-level", more_tokens=(tokenizers.AddedToken("<|tool|>", special=True),))
    pool = EchoPool(vocab_size=len(tokenizer) - 1)
    td = TensorDict(
        history=ChatHistory(prompt=History.from_chats([[{"role": "user", "content": "<|tool|>"}]]), batch_size=[1]),
        batch_size=[1],
    )
    with pytest.raises(
        ConfigError, match=rf"token id {len(tokenizer) - 1} .*served vocabulary has {len(tokenizer) - 1}"
    ):
        SGLangWrapper(pool, tokenizer=tokenizer)(td)
    assert pool.requests == []
