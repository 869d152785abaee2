"""Prompts read from a TensorDict: padding is removed, the order kept, bad input named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import NonTensorStack, TensorDict, lazy_stack
from torchrl.modules.llm.policies import Masks, Tokens

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.rollout.prompts import read_text, read_tokens

PAD, EOS, BOS = 0, 2, 1
ids = st.lists(st.lists(st.integers(1, 319), min_size=1, max_size=12), min_size=1, max_size=6)


def never() -> tuple[int, int, int]:
    raise AssertionError("the padding value was requested although nothing is padded")


def padded(ids_B_T: list[list[int]], side: str, value: int = PAD) -> torch.Tensor:
    width = max(map(len, ids_B_T))
    rows = [[value] * (width - len(i)) + i if side == "left" else i + [value] * (width - len(i)) for i in ids_B_T]
    return torch.tensor(rows)


@settings(deadline=None)
@given(ids, st.sampled_from(["left", "right"]))
def test_a_padded_tensor_gives_back_the_ids_that_were_padded(ids_B_T: list[list[int]], side: str) -> None:
    td = TensorDict({"x": padded(ids_B_T, side)}, batch_size=len(ids_B_T))
    read = read_tokens(td, "x", padding=lambda: (PAD, EOS, BOS))
    assert read.ids_B_T == ids_B_T
    assert read.width == max(map(len, ids_B_T))


@settings(deadline=None)
@given(ids)
def test_ragged_ids_keep_the_padding_id(ids_B_T: list[list[int]]) -> None:
    ids_B_T = [[*i, PAD] for i in ids_B_T] + [[5]]  # the last keeps the lengths uneven
    tensors = [torch.tensor(i) for i in ids_B_T]
    as_lazy = lazy_stack([TensorDict({"x": t}) for t in tensors])
    as_nested = TensorDict({"x": torch.nested.as_nested_tensor(tensors)}, batch_size=len(tensors))
    as_jagged = TensorDict({"x": torch.nested.nested_tensor(tensors, layout=torch.jagged)}, batch_size=len(tensors))
    for td in (as_lazy, as_nested, as_jagged):
        assert read_tokens(td, "x", padding=never).ids_B_T == ids_B_T


@settings(deadline=None)
@given(ids, st.data())
def test_an_attention_mask_takes_precedence_over_the_padding_value(ids_B_T: list[list[int]], data: Any) -> None:
    dense = padded(ids_B_T, "left")
    mask = data.draw(
        st.lists(
            st.lists(st.booleans(), min_size=dense.shape[1], max_size=dense.shape[1]),
            min_size=len(ids_B_T),
            max_size=len(ids_B_T),
        )
    )
    td = TensorDict({"x": dense, "m": torch.tensor(mask)}, batch_size=len(ids_B_T))
    expected = [row[torch.tensor(keep)].tolist() for row, keep in zip(dense, mask, strict=True)]
    assert read_tokens(td, "x", mask_keys=("m",), padding=never).ids_B_T == expected


def test_a_mask_of_other_lengths_is_ignored() -> None:
    td = TensorDict({"x": torch.tensor([[7, 8]]), "m": torch.tensor([[True, True, False]])}, batch_size=1)
    assert read_tokens(td, "x", mask_keys=("m",), padding=lambda: (PAD, EOS, BOS)).ids_B_T == [[7, 8]]


def test_tokens_marked_unpadded_keep_the_padding_id() -> None:
    td = TensorDict(tokens=Tokens(full=torch.tensor([[5, PAD], [6, 7]]), padded=False, batch_size=2), batch_size=2)
    assert read_tokens(td, ("tokens", "full"), padding=never).ids_B_T == [[5, PAD], [6, 7]]


def test_padding_that_is_also_eos_is_only_removed_at_the_ends() -> None:
    td = TensorDict({"x": torch.tensor([[EOS, EOS, 5, EOS, 6], [EOS, 7, 8, 9, 10]])}, batch_size=2)
    assert read_tokens(td, "x", padding=lambda: (EOS, EOS, BOS)).ids_B_T == [[5, EOS, 6], [7, 8, 9, 10]]


def test_an_assistant_mask_loses_the_same_padding_as_its_tokens() -> None:
    td = TensorDict(
        tokens=Tokens(full=torch.tensor([[0, 5, 6], [7, 8, 9]]), padded=True, batch_size=2),
        masks=Masks(all_assistant_mask=torch.tensor([[False, False, True], [False, True, True]]), batch_size=2),
        batch_size=2,
    )
    key = ("masks", "all_assistant_mask")
    read = read_tokens(td, ("tokens", "full"), padding=lambda: (PAD, EOS, BOS), assistant_key=key)
    assert read.assistant_B_T == [[False, True], [False, True, True]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 3), "dtype torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), "dtype torch.bool"),
        (torch.zeros(2, 3, 4, dtype=torch.long), "shape"),
    ],
)
def test_values_that_are_not_token_ids_are_refused_with_the_reason(value: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_tokens(TensorDict({"x": value}, batch_size=2), "x", padding=never)


def test_a_row_without_ids_is_reported_for_that_row_alone() -> None:
    td = lazy_stack([TensorDict({"x": torch.tensor([1, 2])}), TensorDict({"x": torch.tensor([0.5])})])
    read = read_tokens(td, "x", padding=never)
    assert read.ids_B_T == [[1, 2], []]
    assert list(read.problems) == [1]
    assert "float32" in read.problems[1]


def test_a_missing_key_names_the_keys_that_are_there() -> None:
    td = TensorDict({"obs": TensorDict({"ids": torch.zeros(1, 2)}, batch_size=1)}, batch_size=1)
    with pytest.raises(ConfigError, match=r"Expected 'x' key for tokens input mode.*obs\.ids.*input_key"):
        read_tokens(td, "x")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=4))
def test_texts_are_tokenized_in_order_however_they_are_stored(texts: list[str]) -> None:
    class ByteTokenizer:
        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            return {"input_ids": [list(text.encode()) for text in texts]}

    expected = [list(text.encode()) for text in texts]
    stacked = TensorDict({"x": NonTensorStack(*texts)}, batch_size=len(texts))
    rowwise = lazy_stack([TensorDict({"x": text}) for text in texts])
    for td in (stacked, rowwise):
        read = read_text(td, "x", ByteTokenizer(), {})
        assert read.ids_B_T == expected
        assert read.texts_B == texts


def test_one_text_for_a_whole_batch_is_read_once_per_row() -> None:
    class LengthTokenizer:
        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            return {"input_ids": [[len(text)] for text in texts]}

    td = TensorDict(batch_size=3)
    td.set_non_tensor("x", "same")
    assert read_text(td, "x", LengthTokenizer(), {}).ids_B_T == [[4], [4], [4]]
