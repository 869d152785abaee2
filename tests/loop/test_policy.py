"""The policy against Hugging Face on the same checkpoint in every mode, and against TransformersWrapper key by key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torchrl.modules.llm.policies import TransformersWrapper

from tests.loop.rollout_cases import greedy, make_input, reference_log_probs, rows
from torchrl_sglang import AsyncSGLang, SGLangWrapper

MAX_NEW = 10
MODES = ["history", "text", "tokens"]
PADDED = pytest.mark.parametrize("pad_output", [False, True], ids=["ragged", "padded"])


def keys_of(td: TensorDictBase) -> set[tuple[str, ...]]:
    return {k if isinstance(k, tuple) else (k,) for k in td.keys(True, True)}


def without_padding(td: TensorDictBase, part: str, *, padded: bool) -> list[torch.Tensor]:
    """``full``-aligned values of every sequence, cut by the attention mask when they are padded."""
    values = rows(td, *part.split("."))
    masks = rows(td, "masks", "all_attention_mask")
    return [v[m] for v, m in zip(values, masks, strict=True)] if padded else values


@PADDED
@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_and_log_probs_are_those_of_hugging_face(
    engine: AsyncSGLang, model: Any, mode: str, num_samples: int | None, pad_output: bool
) -> None:
    policy = SGLangWrapper(
        engine,
        input_mode=mode,
        pad_output=pad_output,
        num_samples=num_samples,
        generate_kwargs={"max_new_tokens": MAX_NEW, "do_sample": False},
    )
    out = policy(make_input(mode, generate=True))
    assert out.batch_size == ((3,) if num_samples is None else (3, num_samples))
    full = without_padding(out, "tokens.full", padded=pad_output)
    assistant = without_padding(out, "masks.all_assistant_mask", padded=pad_output)
    log_probs = rows(out, "log_probs", "response")
    for ids, written, scores in zip(full, assistant, log_probs, strict=True):
        split = int((~written).sum())
        assert written[:split].sum() == 0
        assert written[split:].all()
        prompt, response = ids[:split].tolist(), ids[split:].tolist()
        assert response == greedy(model, prompt, MAX_NEW)
        torch.testing.assert_close(scores[: len(response)], reference_log_probs(model, ids)[split:], atol=1e-4, rtol=0)
        assert not scores[len(response) :].any()


@PADDED
@pytest.mark.parametrize("mode", MODES)
def test_generating_writes_what_transformers_wrapper_writes(
    engine: AsyncSGLang, model: Any, tokenizer: Any, mode: str, pad_output: bool
) -> None:
    settings = {
        "input_mode": mode,
        "pad_output": pad_output,
        "generate_kwargs": {"max_new_tokens": MAX_NEW, "do_sample": False},
    }
    ours = SGLangWrapper(engine, **settings)(make_input(mode, generate=True, even=True))
    theirs = TransformersWrapper(model, tokenizer=tokenizer, **settings)(make_input(mode, generate=True, even=True))
    assert keys_of(theirs) <= keys_of(ours)
    for part in ("prompt", "response", "full"):
        for a, b in zip(rows(ours, "tokens", part), rows(theirs, "tokens", part), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    for a, b in zip(
        rows(ours, "masks", "all_attention_mask"), rows(theirs, "masks", "all_attention_mask"), strict=True
    ):
        assert a.dtype == b.dtype == torch.bool
        assert torch.equal(a, b)
    if mode != "tokens":
        # of padded conversations TransformersWrapper cuts the response out of a text that begins with padding
        for part in ("prompt",) if mode == "history" and pad_output else ("prompt", "response"):
            assert list(getattr(ours["text"], part)) == list(getattr(theirs["text"], part))
    if mode == "history":
        assert [h.role for h in ours["history"].full.unbind(0)] == [h.role for h in theirs["history"].full.unbind(0)]


@PADDED
@pytest.mark.parametrize("mode", MODES)
def test_scoring_writes_what_transformers_wrapper_writes(
    engine: AsyncSGLang, model: Any, tokenizer: Any, mode: str, pad_output: bool
) -> None:
    settings = {"input_mode": mode, "pad_output": pad_output, "generate": False}
    ours = SGLangWrapper(engine, **settings)(make_input(mode, generate=False))
    theirs = TransformersWrapper(model, tokenizer=tokenizer, **settings)(make_input(mode, generate=False))
    assert keys_of(ours) == keys_of(theirs)
    for key in keys_of(ours):
        for a, b in zip(rows(ours, *key), rows(theirs, *key), strict=True):
            assert a.dtype == b.dtype, key
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
    if mode == "history":
        assert all(m.any() for m in rows(ours, "masks", "all_assistant_mask"))
        assert list(ours["text"].full) == list(theirs["text"].full)


@pytest.mark.parametrize("generate", [True, False], ids=["generate", "score"])
@pytest.mark.parametrize("mode", MODES)
def test_inplace_decides_where_the_output_is_written(engine: AsyncSGLang, mode: str, generate: bool) -> None:
    def run(inplace: Any) -> tuple[TensorDictBase, TensorDictBase]:
        td = make_input(mode, generate=generate)
        td["extra"] = torch.zeros(3)
        policy = SGLangWrapper(
            engine,
            input_mode=mode,
            generate=generate,
            inplace=inplace,
            generate_kwargs={"max_new_tokens": 2, "temperature": 0},
        )
        return td, policy(td)

    outputs = {"tokens", "masks", "log_probs", *(["text"] if mode != "tokens" else [])}
    outputs |= {"history"} if mode == "history" else set()
    outputs |= {"generation"} if generate else set()
    for inplace in (None, True):
        td, out = run(inplace)
        assert out is td
        assert set(td.keys()) == outputs | {"extra"}
    td, out = run(False)
    assert out is not td
    assert set(out.keys()) == outputs
    assert "log_probs" not in td
    td, out = run("empty")
    assert out is not td
    assert set(out.keys()) == outputs
    assert "log_probs" not in td
