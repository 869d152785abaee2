"""Texts and tokens that go past transformers' own call are the same as with it, for every kind of tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.matrix.tokenizer_kinds import TOKENIZERS, make_tokenizer
from torchrl_sglang.fast_tokenizers import decode_plainly, encode_plainly

TEXTS = (
    *("", " ", "\n", "a", " a", "a ", "Hello, world!  Two  spaces\tand\ttabs\r\n\r\n", "x" * 300),
    *("<|im_start|>user\nHi<|im_end|>\n", "<s>[INST] Hi [/INST]</s>", "<bos><start_of_turn>user\n", "▁ ▁▁ _"),
    *(
        "naïve café",
        "日本語のテキスト",
        "🙂👩‍👩‍👧‍👦",
        "e\u0301 é \ufb01",
        "\u00a0\u200b\ufeff",
        "\x00\x01\x7f",
        "ТЕКСТ İ ß",
    ),
    "def f(x):\n    return x ** 2  # 3.14e-10\n",
)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_and_texts_are_those_of_the_tokenizers_own_call(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encode_plainly(tokenizer, text) == ids, repr(text)
        # also the tokens of half a character, and special tokens
        for part in (ids, ids[:-1], ids[1:], [*ids, *tokenizer.all_special_ids]):
            own = tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert decode_plainly(tokenizer, part) == own, repr(text)


def test_special_tokens_stay_text_where_the_tokenizer_splits_them() -> None:
    tokenizer = make_tokenizer("byte-level BPE")
    end = tokenizer.eos_token
    tokenizer.split_special_tokens = True
    before = encode_plainly(tokenizer, end)  # the Rust tokenizer is told at the next call
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    assert before in (None, ids)
    assert encode_plainly(tokenizer, end) == ids != [tokenizer.eos_token_id]


def test_a_truncation_or_padding_that_is_left_from_another_call_has_no_effect() -> None:
    tokenizer = make_tokenizer("byte-level BPE")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer(["a b c d e f g", "a"], padding=True, truncation=True, max_length=2)
    ids = encode_plainly(tokenizer, "a b c d e f g")
    assert ids in (None, tokenizer("a b c d e f g", add_special_tokens=False)["input_ids"])


def test_a_tokenizer_with_its_own_way_is_asked_itself() -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
            return {"input_ids": [7]}

        def _decode(self, *args: Any, **kwargs: Any) -> str:
            return "seven"

    class Wrapped:
        def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    own = Own(tokenizer_object=make_tokenizer("byte-level BPE").backend_tokenizer)
    assert encode_plainly(own, "a") is None
    assert decode_plainly(own, [1]) is None
    assert encode_plainly(Wrapped(), "a") is None
