"""The policy on an EchoPool, without a server: ids, log-probs, masks and versions are aligned in every shape."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.modules.llm.policies import Tokens

from torchrl_sglang import SGLangWrapper
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError, RequestRejectedError
from torchrl_sglang.protocol.messages import GenerateReply, WeightSpan
from torchrl_sglang.rollout.generation import NO_TOKEN
from torchrl_sglang.testing.echo_pool import EchoPool

ids_lists = st.lists(st.lists(st.integers(0, 319), min_size=1, max_size=9), min_size=1, max_size=5)


class Bytes:
    """A tokenizer of 320 ids: enough to pad with."""

    pad_token_id = 0
    eos_token_id = 2


def ragged(ids_B_T: Sequence[Sequence[int]]) -> TensorDictBase:
    return lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(list(i)), padded=False)) for i in ids_B_T])


def policy(pool: Any = None, **kwargs: Any) -> SGLangWrapper:
    kwargs = {"input_mode": "tokens", "tokenizer": Bytes(), "generate_kwargs": {"max_new_tokens": 4}, **kwargs}
    return SGLangWrapper(pool or EchoPool(), **kwargs)


def rows(td: TensorDictBase, *key: str) -> list[torch.Tensor]:
    return list(td.reshape(-1).get(key, as_list=True))


@settings(max_examples=40, deadline=None)
@given(
    ids_lists,
    st.booleans(),
    st.sampled_from([None, 1, 3]),
    st.integers(0, 6),
    st.lists(st.integers(0, 319), max_size=3),
)
def test_ids_log_probs_masks_and_versions_stay_aligned(
    ids_B_T: list[list[int]], pad: bool, num_samples: int | None, max_new: int, stops: list[int]
) -> None:
    kwargs = {"max_new_tokens": max_new, "stop_token_ids": stops}
    out = policy(pad_output=pad, num_samples=num_samples, generate_kwargs=kwargs)(ragged(ids_B_T))
    n = num_samples or 1
    expected = EchoPool().generate(ids_B_T, SamplingParams.from_kwargs(**kwargs))
    assert out.batch_size == (len(ids_B_T),) + (() if num_samples is None else (num_samples,))
    widths = [max(map(len, ids_B_T)), max(len(r.output_ids) for r in expected)]
    generation = out["generation"].reshape(-1)
    for index, (prompt, response, full, attended, written, scores, versions) in enumerate(
        zip(
            rows(out, "tokens", "prompt"),
            rows(out, "tokens", "response"),
            rows(out, "tokens", "full"),
            rows(out, "masks", "all_attention_mask"),
            rows(out, "masks", "all_assistant_mask"),
            rows(out, "log_probs", "response"),
            rows(out, "generation", "weight_version"),
            strict=True,
        )
    ):
        prompt_ids, reply = ids_B_T[index // n], expected[index // n]
        made = len(reply.output_ids)
        if pad:
            assert [len(prompt), len(response)] == widths
        assert torch.equal(full, torch.cat([prompt, response]))
        assert full[attended].tolist() == [*prompt_ids, *reply.output_ids]
        assert full[written].tolist() == reply.output_ids
        assert int(attended.sum()) == len(prompt_ids) + made
        assert scores[:made].tolist() == pytest.approx(reply.output_logprobs)
        assert not scores[made:].any()
        assert versions[:made].tolist() == [0] * made
        assert (versions[made:] == NO_TOKEN).all()
        assert [len(response)] * 2 == [len(scores), len(versions)]
        assert int(generation.prompt_tokens[index]) == len(prompt_ids)
        assert int(generation.completion_tokens[index]) == made
        assert bool(generation.truncated[index]) == (reply.finish_reason != "stop")


@pytest.mark.parametrize("pad", [False, True])
def test_full_log_probs_are_nan_for_prompt_tokens_without_prompt_logprobs(pad: bool) -> None:
    silent = policy(pad_output=pad)(ragged([[5, 6], [7]]))
    for full, written in zip(
        rows(silent, "log_probs", "full"), rows(silent, "masks", "all_assistant_mask"), strict=True
    ):
        assert len(full) == len(written)
        assert full[~written].isnan().all()
        assert not full[written].isnan().any()
    scored = policy(pad_output=pad, generate_kwargs={"max_new_tokens": 4, "prompt_logprobs": True})(
        ragged([[5, 6], [7]])
    )
    assert rows(scored, "log_probs", "prompt")[0].tolist() == pytest.approx([0.0, -0.006])
    assert not any(full.isnan().any() for full in rows(scored, "log_probs", "full"))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 2), (2, 1, 2)])
@pytest.mark.parametrize("num_samples", [None, 2])
def test_every_batch_shape_comes_back_with_samples_last(shape: tuple[int, ...], num_samples: int | None) -> None:
    count = int(torch.tensor(shape).prod()) if shape else 1
    ids = torch.arange(5, 5 + count)[:, None].expand(count, 2).reshape(*shape, 2)
    td = TensorDict(tokens=Tokens(prompt=ids, padded=False, batch_size=shape), batch_size=shape)
    out = policy(num_samples=num_samples)(td)
    assert out.batch_size == shape + (() if num_samples is None else (num_samples,))
    firsts = torch.stack(rows(out, "tokens", "prompt"))[:, 0].tolist()
    assert firsts == [5 + i // (num_samples or 1) for i in range(count * (num_samples or 1))]
    if num_samples is None:
        assert out is td


def test_an_empty_batch_sends_no_request() -> None:
    pool = EchoPool()
    td = TensorDict(batch_size=0)
    assert policy(pool)(td) is td
    assert policy(pool, num_samples=3)(td).batch_size == (0, 3)
    assert pool.requests == []


def test_all_prompts_are_sent_in_one_request_without_padding() -> None:
    pool = EchoPool()
    td = TensorDict({("tokens", "prompt"): torch.tensor([[0, 0, 5], [6, 7, 8]])}, batch_size=2)
    policy(pool)(td)
    assert pool.requests == [[[5], [6, 7, 8]]]


def test_every_output_is_written_at_its_key() -> None:
    out = policy(
        tokens_key=("agent", "tok"), masks_key="m", log_probs_key="lp", generation_key=("agent", "gen"), inplace=False
    )(ragged([[5, 6]]))
    assert set(out.keys()) == {"agent", "m", "lp"}
    assert out["agent", "tok", "full"].tolist() == [[5, 6, 6, 5, 6, 5]]
    assert out["agent", "gen"].completion_tokens.tolist() == [4]
    assert "generation" not in policy(generation_key=None)(ragged([[5]]))


def test_tensordict_out_is_written_and_returned() -> None:
    target = TensorDict({"kept": torch.ones(1), "tokens": torch.zeros(1)}, batch_size=1)
    source = ragged([[5, 6]])
    assert policy()(source, tensordict_out=target) is target
    assert set(target.keys()) == {"kept", "tokens", "masks", "log_probs", "generation"}
    assert set(source.keys()) == {"tokens"}


def test_arguments_of_a_call_replace_those_of_the_policy_for_that_call() -> None:
    made = policy(generate_kwargs={"max_tokens": 4})
    assert len(rows(made(ragged([[5]]), max_new_tokens=2), "tokens", "response")[0]) == 2
    assert len(rows(made(ragged([[5]])), "tokens", "response")[0]) == 4
    with pytest.raises(ConfigError, match="set num_samples"):
        made(ragged([[5]]), n=3)
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        made(ragged([[5]]), temprature=3)


# ------------------------------------------------------------------------------------------------------------ bad input


BAD = [([5, 320], "vocabulary"), ([-100, 5], "negative"), ([], "empty"), ([5] * 40, "context length|at most")]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_prompt_is_refused_by_index_and_nothing_is_sent(bad: list[int], message: str) -> None:
    pool = EchoPool(context_length=32)
    with pytest.raises(ConfigError, match=rf"1.*({message})"):
        policy(pool)(ragged([[5, 6], bad]))
    assert pool.requests == []


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_prompt_is_masked_and_the_others_are_served(bad: list[int], message: str, pad: bool) -> None:
    pool = EchoPool(context_length=32)
    out = policy(pool, on_error="mask", pad_output=pad, num_samples=2)(ragged([[5, 6], bad, [7]]))
    assert pool.requests == [[[5, 6], [7]]]
    generation = out["generation"].reshape(-1)
    assert [bool(e) for e in generation.error] == [False, False, True, True, False, False]
    assert "prompt 1" in generation.error[2]
    assert generation.finish_reason[2] == "error"
    assert generation.completion_tokens.tolist() == [4, 4, 0, 0, 4, 4]
    written = rows(out, "masks", "all_assistant_mask")
    assert [int(w.sum()) for w in written] == [4, 4, 0, 0, 4, 4]
    assert all(0 <= int(i) < 320 for full in rows(out, "tokens", "full") for i in full)


def test_a_row_of_the_wrong_dtype_is_masked_too() -> None:
    td = lazy_stack([TensorDict(tokens=Tokens(prompt=p)) for p in (torch.tensor([5, 6]), torch.tensor([0.5]))])
    with pytest.raises(ConfigError, match="batch index 1.*float32"):
        policy()(td)
    generation = policy(on_error="mask")(td)["generation"]
    assert "float32" in generation.error[1]
    assert generation.error[0] == ""


def test_a_rejected_batch_is_halved_until_the_bad_prompt_is_alone() -> None:
    class Picky(EchoPool):
        def generate(self, ids_B_T: Any, *args: Any, **kwargs: Any) -> list[GenerateReply]:
            if any(13 in ids_T for ids_T in ids_B_T):
                raise RequestRejectedError("13 is not allowed", status=400)
            return super().generate(ids_B_T, *args, **kwargs)

    prompts = [[i] for i in range(10, 18)]
    with pytest.raises(RequestRejectedError):
        policy(Picky())(ragged(prompts))
    generation = policy(Picky(), on_error="mask")(ragged(prompts))["generation"]
    assert ["not allowed" in error for error in generation.error] == [i == 13 for (i,) in prompts]


def test_a_rejected_prompt_does_not_mask_those_of_other_threads_in_its_request() -> None:
    class Picky(EchoPool):
        def generate(self, ids_B_T: Any, *args: Any, **kwargs: Any) -> list[GenerateReply]:
            replies = super().generate(ids_B_T, *args, **kwargs)
            if any(13 in ids_T for ids_T in ids_B_T):
                raise RequestRejectedError("13 is not allowed", status=400)
            return replies

    pool = Picky()
    together = policy(pool, on_error="mask", batching=True, min_batch_size=2)
    errors: dict[int, str] = {}

    def call(token: int) -> None:
        errors[token] = together(ragged([[token]]))["generation"].error[0]

    threads = [threading.Thread(target=call, args=(token,)) for token in (13, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors[14] == ""
    assert "not allowed" in errors[13]
    assert sorted(pool.requests[0]) == [[13], [14]]


def test_a_prompt_that_is_too_long_keeps_its_end() -> None:
    out = policy(EchoPool(context_length=10), on_overlong="truncate_left")(ragged([list(range(5, 25)), [5]]))
    assert rows(out, "tokens", "prompt")[0].tolist() == list(range(19, 25))
    assert out["generation"].dropped_tokens.tolist() == [14, 0]
    assert out["generation"].prompt_tokens.tolist() == [6, 1]


def test_nan_temperature_is_refused_when_the_policy_is_made() -> None:
    with pytest.raises(ConfigError, match="temperature must be a finite number"):
        policy(generate_kwargs={"temperature": float("nan")})


# ------------------------------------------------------------------------------------------------------------- resuming


class Interrupted(EchoPool):
    """Aborts every response after ``after`` tokens and increments the version, as a weight update does."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def generate(self, ids_B_T: Any, sampling: SamplingParams, **kwargs: Any) -> list[GenerateReply]:
        replies = super().generate(ids_B_T, sampling, **kwargs)
        version = str(self.weight_version)
        self.weight_version += 1
        return [self._cut(reply, version) for reply in replies]

    def _cut(self, reply: GenerateReply, version: str) -> GenerateReply:
        cut = len(reply.output_ids) > self.after
        length = min(len(reply.output_ids), self.after)
        return replace(
            reply,
            output_ids=reply.output_ids[:length],
            output_logprobs=(reply.output_logprobs or [])[:length],
            finish_reason="abort" if cut else reply.finish_reason,
            completion_tokens=length,
            weight_spans=(WeightSpan(version=version, start=0, end=length),),
        )


def test_a_response_aborted_near_the_end_of_the_context_is_not_resumed() -> None:
    pool = Interrupted(after=3)
    pool.max_prompt_tokens = 7
    out = policy(pool, generate_kwargs={"max_new_tokens": 6})(ragged([[5, 6, 7, 8, 9], [7]]))
    assert list(out["generation"].finish_reason) == ["abort", "length"]
    assert out["generation"].completion_tokens.tolist() == [3, 6]


def test_an_interrupted_response_continues_from_its_tokens_and_keeps_their_versions() -> None:
    pool = Interrupted(after=2)
    out = policy(pool, generate_kwargs={"max_new_tokens": 5})(ragged([[5, 6], [7]]))
    first = rows(out, "tokens", "response")[0]
    assert pool.requests[1] == [[5, 6, 6, 5], [7, 7, 7]]  # prompts and what they had
    assert len(first) == 5
    assert rows(out, "generation", "weight_version")[0].tolist() == [0, 0, 1, 1, 2]
    assert len(rows(out, "log_probs", "response")[0]) == 5
    assert out["generation"].resumes.tolist() == [2, 2]
    assert list(out["generation"].finish_reason) == ["length", "length"]
    assert out["generation"].prompt_tokens.tolist() == [2, 1]


def test_resuming_ends_at_max_resumes_and_keeps_the_partial_response() -> None:
    out = policy(Interrupted(after=1), max_resumes=2, generate_kwargs={"max_new_tokens": 9})(ragged([[5]]))
    assert rows(out, "tokens", "response")[0].tolist() == [5, 5, 5]
    assert list(out["generation"].finish_reason) == ["abort"]
    assert out["generation"].truncated.tolist() == [True]
    assert policy(Interrupted(after=1), max_resumes=0)(ragged([[5]]))["generation"].resumes.tolist() == [0]


# -------------------------------------------------------------------------------------------------- copies and batching


def test_a_new_version_keeps_all_settings() -> None:
    first = policy(
        num_samples=2,
        tokens_key="tok",
        generation_key="gen",
        on_error="mask",
        on_overlong="truncate_left",
        max_resumes=3,
        prefer_tokens=True,
        batching=True,
        min_batch_size=2,
        max_batch_size=4,
        batching_timeout=0.5,
        attention_mask_key="am",
        input_key="ids",
        device="cpu",
        progress=True,
    )
    second = first.get_new_version()
    assert second.settings == first.settings
    assert second.model is first.model
    assert second.get_batching_state()["max_batch_size"] == 4
    scorer = first.get_new_version(generate=False)
    assert scorer.in_keys == [("tokens", "full")]
    assert scorer.num_samples is None
    assert scorer.get_new_version(generate=True).num_samples == 2
    with pytest.raises(ConfigError, match="Did you mean 'pad_output'"):
        first.get_new_version(pad_ouput=True)


def test_a_pickled_policy_answers_like_the_original() -> None:
    original = policy(batching=True)

    class Collector:
        pass

    collector = Collector()
    original.register_collector(collector)
    copy = pickle.loads(pickle.dumps(original))
    assert copy.collector is None
    assert original.collector is collector
    assert rows(copy(ragged([[5, 6]])), "tokens", "full")[0].tolist() == [5, 6, 6, 5, 6, 5]


def test_threads_that_call_together_share_a_request() -> None:
    pool = EchoPool()
    shared = policy(pool, batching=True, min_batch_size=16, batching_timeout=60)
    results: dict[int, list[int]] = {}

    def call(i: int) -> None:
        results[i] = rows(shared(ragged([[10 + i]])), "tokens", "full")[0].tolist()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(pool.requests) == 1
    assert results == {i: [10 + i] * 5 for i in range(16)}


def test_calls_with_other_sampling_never_share_a_request() -> None:
    pool = EchoPool()
    shared = policy(pool, batching=True, min_batch_size=2, batching_timeout=0.2)
    lengths: dict[int, int] = {}

    def call(length: int) -> None:
        lengths[length] = len(rows(shared(ragged([[5]]), max_new_tokens=length), "tokens", "response")[0])

    threads = [threading.Thread(target=call, args=(length,)) for length in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert lengths == {1: 1, 2: 2, 3: 3}
    assert len(pool.requests) == 3


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_mode": "txt"}, "input_mode must be one of"),
        ({"pad_model_input": True}, "pad_model_input is not supported"),
        ({"pad_output": 1}, "pad_output must be a boolean"),
        ({"layout": torch.jagged}, "as_nested_tensor"),
        ({"generate": False, "return_log_probs": False}, "return_log_probs must be True when generate=False"),
        ({"batching": False, "min_batch_size": 2}, "must be None if batching is False"),
        ({"min_batch_size": 5, "max_batch_size": 2}, "must be <="),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_samples": 2, "inplace": True}, "inplace must be False"),
        ({"generate_kwargs": {"n": 2}, "inplace": "empty"}, "inplace must be False"),
        ({"num_samples": 2, "generate_kwargs": {"n": 3}}, "differs from"),
        ({"generate_kwargs": {"num_beams": 4}}, "no beam search"),
        ({"generate_kwargs": {"logprobs": 5}}, "only the log-prob of the chosen token"),
        ({"generate_kwargs": {"logprobs": True}, "return_log_probs": False}, "contradicts"),
        ({"generate_kwargs": {"max_tokns": 5}}, "Did you mean 'max_tokens'"),
        ({"tokenizer_kwargs": {"padding_side": "right"}}, "padding_side"),
        ({"on_error": "ignore"}, "on_error must be one of"),
        ({"num_sample": 2}, "Did you mean 'num_samples'"),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(**kwargs)


def test_without_log_probs_none_are_written() -> None:
    for made in (policy(return_log_probs=False), policy(generate_kwargs={"logprobs": False})):
        assert made.out_keys == ["masks", "tokens"]
        assert set(made(ragged([[5]])).keys()) == {"masks", "tokens", "generation"}


def test_logits_are_not_supported() -> None:
    scorer = policy(generate=False)
    with pytest.raises(NotImplementedError):
        scorer(ragged([[5]]), logits_only=True)
    with pytest.raises(NotImplementedError):
        scorer.get_dist(ragged([[5]]))
