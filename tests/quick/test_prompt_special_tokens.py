"""Special tokens are in a prompt once, EOS does not end it, and padding is only at the ends of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules.llm.policies import Text
from transformers import ByT5Tokenizer

from tests.tokenizers_made import INST, KINDS, make_tokenizer
from torchrl_sglang import AsyncSGLang, ConfigError, SGLangWrapper
from torchrl_sglang.rollout.prompts import read_tokens
from torchrl_sglang.testing.echo_pool import EchoPool
from torchrl_sglang.text_tokens import decode_ids, encode_texts

TEXTS = ["The quick fox", "a", "What is 2 + 3?"]


def sent(tokenizer: Any, texts: list[str], **kwargs: Any) -> list[list[int]]:
    pool = EchoPool(vocab_size=len(tokenizer))
    name = "prompt" if kwargs.get("generate", True) else "full"
    td = TensorDict(text=Text(**{name: texts}, batch_size=[len(texts)]), batch_size=[len(texts)])
    settings = {"generate_kwargs": {"max_new_tokens": 2}} if name == "prompt" else {}
    SGLangWrapper(pool, tokenizer=tokenizer, input_mode="text", **settings, **kwargs)(td)
    return pool.requests[0]


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_special_tokens_that_its_tokenizer_adds(kind: Any, bos: bool, generate: bool) -> None:
    tokenizer = make_tokenizer(kind, bos=bos)
    assert sent(tokenizer, TEXTS, generate=generate) == tokenizer(TEXTS)["input_ids"]


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "unigram"])
def test_a_text_that_begins_with_bos_gets_no_second_one(kind: Any, generate: bool) -> None:
    tokenizer = make_tokenizer(kind, chat_template=INST)
    talk = [{"role": "user", "content": "What is 2 + 3?"}]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False), "plain", "<s>", "<s><s>twice on purpose"]
    assert sent(tokenizer, texts, generate=generate) == [
        tokenizer.apply_chat_template(talk, return_dict=False),
        tokenizer("plain")["input_ids"],
        [tokenizer.bos_token_id],
        tokenizer("<s><s>twice on purpose", add_special_tokens=False)["input_ids"],
    ]
    raw = {"add_special_tokens": False}
    assert sent(tokenizer, texts, generate=generate, tokenizer_kwargs=raw) == tokenizer(texts, **raw)["input_ids"]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_an_eos_that_the_tokenizer_adds_does_not_end_a_prompt(kind: Any) -> None:
    tokenizer = make_tokenizer(kind, eos_added=True)
    bare = make_tokenizer(kind)
    assert tokenizer("The fox")["input_ids"][-1] == tokenizer.eos_token_id
    assert sent(tokenizer, ["The fox", "The fox</s>"]) == [
        bare("The fox")["input_ids"],
        bare("The fox</s>")["input_ids"],
    ]
    # a whole sequence ends as its tokenizer ends it, once
    assert sent(tokenizer, ["The fox", "The fox</s>"], generate=False) == [tokenizer("The fox")["input_ids"]] * 2


def test_special_tokens_before_and_behind_a_text_are_each_there_once() -> None:
    tokenizer = make_tokenizer("wordpiece")
    texts = ["the fox", "[CLS] the fox", "the fox [SEP]", "[CLS] the fox [SEP]"]
    assert encode_texts(tokenizer, texts) == [tokenizer("the fox")["input_ids"]] * 4
    assert encode_texts(tokenizer, []) == []


# ------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0, 0, 5, 0, 6]], [[5, 0, 6]]),
        ([[5, 0, 0, 6, 0]], [[5, 0, 0, 6]]),
        ([[0, 5, 6, 0], [5, 0, 0, 6]], [[5, 6], [5, 0, 0, 6]]),
        ([[5, 6, 7]], [[5, 6, 7]]),
    ],
)
def test_only_the_outer_run_of_the_padding_id_is_padding(rows: list[list[int]], expected: list[list[int]]) -> None:
    td = TensorDict({"x": torch.tensor(rows)}, batch_size=len(rows))
    assert read_tokens(td, "x", padding=lambda: (0, 2, 1)).ids_B_T == expected


@pytest.mark.parametrize(
    ("rows", "bos", "expected"),
    [
        ([[2, 2, 5, 2], [5, 6, 7, 2]], 1, [[5, 2], [5, 6, 7, 2]]),  # padded on the left, ends with EOS
        ([[2, 5, 2, 2], [2, 5, 6, 7]], 2, [[2, 5], [2, 5, 6, 7]]),  # padded on the right, begins with BOS
        ([[2, 2, 5, 6], [2, 5, 2, 2]], 1, [[5, 6], [5]]),  # a prompt and a response, each padded
        ([[2]], 2, [[2]]),  # text from nothing
    ],
)
def test_an_end_or_beginning_of_text_that_is_also_the_padding_id_stays(
    rows: list[list[int]], bos: int, expected: list[list[int]]
) -> None:
    td = TensorDict({"x": torch.tensor(rows)}, batch_size=len(rows))
    assert read_tokens(td, "x", padding=lambda: (2, 2, bos)).ids_B_T == expected


def test_a_row_of_padding_is_refused_and_named_unless_a_mask_says_what_it_is() -> None:
    ids = torch.tensor([[5, 6], [0, 0]])
    policy = SGLangWrapper(
        EchoPool(), tokenizer=make_tokenizer("byte-level", pad="<unk>"), input_mode="tokens", inplace=False
    )
    policy = policy.get_new_version(generate_kwargs={"max_new_tokens": 1})
    td = TensorDict({("tokens", "prompt"): ids}, batch_size=2)
    with pytest.raises(ConfigError, match="batch index 1.*nothing but the padding token 0.*attention mask"):
        policy(td)
    assert policy(td.clone().set("attention_mask", torch.ones(2, 2)))["tokens", "prompt"].tolist() == ids.tolist()
    masked = policy.get_new_version(on_error="mask")(td)["generation"]
    assert [bool(error) for error in masked.error] == [False, True]


def test_a_tokenizer_without_padding_and_end_tokens_pads_nothing() -> None:
    tokenizer = make_tokenizer("byte-level", pad=None)
    td = TensorDict({("tokens", "prompt"): torch.tensor([[7, 0, 8], [9, 9, 2]])}, batch_size=2)
    settings = {"tokenizer": tokenizer, "input_mode": "tokens", "generate_kwargs": {"max_new_tokens": 1}}
    assert SGLangWrapper(EchoPool(), pad_output=True, **settings).padding_value == tokenizer.eos_token_id
    tokenizer.eos_token = None
    pool = EchoPool(eos_id=1)
    SGLangWrapper(pool, **settings)(td)
    assert pool.requests == [[[7, 0, 8], [9, 9, 2]]]
    with pytest.raises(ConfigError, match="nothing to pad with: set tokenizer.pad_token"):
        SGLangWrapper(pool, pad_output=True, **settings)(td)


def test_a_padding_token_outside_the_served_vocabulary_is_read_but_not_written() -> None:
    tokenizer = make_tokenizer("byte-level", pad=None)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    pad, pool = tokenizer.pad_token_id, EchoPool(vocab_size=len(tokenizer) - 1)
    assert pad == len(tokenizer) - 1
    policy = SGLangWrapper(
        pool, tokenizer=tokenizer, input_mode="tokens", pad_output=True, generate_kwargs={"max_new_tokens": 2}
    )
    out = policy(TensorDict({("tokens", "prompt"): torch.tensor([[pad, 5], [6, 7]])}, batch_size=2))
    assert pool.requests == [[[5], [6, 7]]]
    assert out["tokens", "full"].max() < pool.vocab_size
    assert out["tokens", "prompt"][0].tolist() == [tokenizer.eos_token_id, 5]


def test_the_engine_adds_special_tokens_once_too() -> None:
    class Timed(EchoPool):
        def generate(self, *args: Any, timeout_s: float | None = None, **kwargs: Any) -> Any:
            return super().generate(*args, **kwargs)

    tokenizer, bare = make_tokenizer("sentencepiece", eos_added=True), make_tokenizer("sentencepiece")
    pool: Any = Timed(vocab_size=len(tokenizer))
    engine = AsyncSGLang(pool)
    engine._tokenizer = tokenizer
    engine.generate(["The fox", "<s>The fox"], max_new_tokens=1)
    assert pool.requests == [[bare("The fox")["input_ids"], bare("<s>The fox", add_special_tokens=False)["input_ids"]]]


def test_ids_without_a_token_are_no_text() -> None:
    slow = ByT5Tokenizer()
    assert decode_ids(slow, [[100, 10**6, 101]]) == ["ab"]
    fast = make_tokenizer("byte-level")
    assert decode_ids(fast, [[*fast("ab", add_special_tokens=False)["input_ids"], 10**6]]) == ["ab"]


def test_a_slow_tokenizer_is_read_the_same_way() -> None:
    tokenizer = ByT5Tokenizer()  # adds EOS
    assert sent(tokenizer, ["The fox"]) == [tokenizer("The fox")["input_ids"][:-1]]
    assert sent(tokenizer, ["The fox"], generate=False) == [tokenizer("The fox")["input_ids"]]
