"""The tokens of a conversation are kept from turn to turn; only the new part is tokenized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory
from transformers import AutoTokenizer

from torchrl_sglang import ConfigError, SGLangWrapper
from torchrl_sglang.chat_templates import ChatRenderer
from torchrl_sglang.rollout.incremental_tokens import RewrittenAnswer, continue_tokens
from torchrl_sglang.rollout.messages import history_messages
from torchrl_sglang.testing.echo_pool import EchoPool

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(make_model: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(make_model(arch="llama", seed=0))


def conversation(*messages: tuple[str, str]) -> History:
    return History.from_chats([[{"role": role, "content": content} for role, content in messages]])[0]


def extend(tokenizer: Any, ids_T: list[int], history: History, *, rewritten: bool = False, **template: Any) -> Any:
    return continue_tokens(ids_T, history_messages(history), ChatRenderer(tokenizer, **template), rewritten=rewritten)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(3, 319), min_size=1, max_size=12), st.booleans())
def test_sampled_tokens_are_kept_in_the_next_prompt(tokenizer: Any, sampled: list[int], ended: bool) -> None:
    first = conversation(("user", "dog"))
    prompt = tokenizer(first.apply_chat_template(tokenizer=tokenizer), add_special_tokens=False)["input_ids"]
    answer = tokenizer.decode(sampled)
    known = [*prompt, *sampled, *([tokenizer.eos_token_id] if ended else [])]
    joined = extend(tokenizer, known, conversation(("user", "dog"), ("assistant", answer), ("user", "fox")))
    assert joined is not None
    assert joined[: len(known)] == known
    closing = "" if ended else "<|im_end|>"
    assert (
        tokenizer.decode(joined[len(known) :]) == f"{closing}\n<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokens_of_an_answer_that_the_template_rewrites_are_kept_on_request_only(tokenizer: Any) -> None:
    history = conversation(("user", "dog"), ("assistant", "hmm</think>It is lazy."), ("user", "fox"))
    said = "<|im_start|>user\ndog<|im_end|>\n<|im_start|>assistant\nhmm</think>It is lazy.<|im_end|>"
    known = tokenizer(said)["input_ids"]
    with pytest.raises(RewrittenAnswer):
        extend(tokenizer, known, history, chat_template=THINKING)
    joined = extend(tokenizer, known, history, chat_template=THINKING, rewritten=True)
    assert joined is not None
    assert joined[: len(known)] == known
    assert tokenizer.decode(joined[len(known) :]) == "\n<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"


def test_tokens_of_another_conversation_are_not_used(tokenizer: Any) -> None:
    known = tokenizer("<|im_start|>user\ncat<|im_end|>\n")["input_ids"]
    assert extend(tokenizer, known, conversation(("user", "dog"))) is None
    assert extend(tokenizer, known, conversation(("user", "dog"), ("assistant", "yes"), ("user", "fox"))) is None


def test_the_policy_writes_the_answer_into_the_conversation(tokenizer: Any) -> None:
    history = History.from_chats([[{"role": "user", "content": "dog"}], [{"role": "user", "content": "a longer one"}]])
    td = TensorDict(history=ChatHistory(prompt=history, batch_size=[2]), batch_size=[2])
    out = SGLangWrapper(EchoPool(), tokenizer=tokenizer, generate_kwargs={"max_new_tokens": 9}, num_samples=2)(td)
    flat = out.reshape(-1)
    assert len(flat) == 4
    for full, text in zip(flat["history"].full.unbind(0), flat["text"].unbind(0), strict=True):
        assert list(full.role) == ["user", "assistant"]
        assert full.content[-1] == text.response
        assert text.full == text.prompt + text.response
        assert not full.is_complete[-1]


def test_a_template_that_refuses_a_conversation_names_it(tokenizer: Any) -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users first') }}{% endif %}x"
    history = History.from_chats([[{"role": "user", "content": "dog"}], [{"role": "system", "content": "be nice"}]])
    td = TensorDict(history=ChatHistory(prompt=history, batch_size=[2]), batch_size=[2])
    policy = SGLangWrapper(EchoPool(), tokenizer=tokenizer, chat_template=strict, generate_kwargs={"max_new_tokens": 2})
    with pytest.raises(ConfigError, match="batch index 1.*users first"):
        policy(td)
    assert policy.get_new_version(on_error="mask")(td)["generation"].completion_tokens.tolist() == [2, 0]


def test_a_value_that_is_not_a_history_is_refused(tokenizer: Any) -> None:
    policy = SGLangWrapper(EchoPool(), tokenizer=tokenizer)
    with pytest.raises(TypeError, match="Expected History object"):
        policy(TensorDict({("history", "prompt"): TensorDict(batch_size=1)}, batch_size=1))
    with pytest.raises(ConfigError, match="Expected .* key for history input mode"):
        policy(TensorDict(batch_size=1))
