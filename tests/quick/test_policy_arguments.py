"""Arguments of a policy have their effect or are refused, also with masked errors."""

from __future__ import annotations

import json
import types
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from tests.tokenizers_made import make_tokenizer
from torchrl_sglang import ConfigError, SamplingParams, SGLangWrapper
from torchrl_sglang.chat.defaults import GenerationDefaults
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.rollout.log_probs import behaviour_log_probs
from torchrl_sglang.rollout.resuming import generate_resuming
from torchrl_sglang.scores import RewardModel
from torchrl_sglang.testing.echo_pool import EchoPool


def prompts(*ids: list[int]) -> TensorDict:
    return TensorDict(
        {("tokens", "prompt"): torch.tensor(ids), "attention_mask": torch.ones(len(ids), len(ids[0]))}, len(ids)
    )


def tokens_policy(**kwargs: Any) -> SGLangWrapper:
    pool = kwargs.pop("pool", None) or EchoPool()
    return SGLangWrapper(pool, input_mode="tokens", **{"generate_kwargs": {"max_new_tokens": 2}, **kwargs})


@pytest.mark.parametrize("on_overlong", ["raise", "truncate_left"])
def test_settings_under_which_no_prompt_fits_are_raised_although_errors_are_masked(on_overlong: str) -> None:
    policy = tokens_policy(
        pool=EchoPool(context_length=16), on_error="mask", on_overlong=on_overlong, generate_kwargs={"max_tokens": 16}
    )
    with pytest.raises(ConfigError, match="no prompt can be served with these settings"):
        policy(prompts([5, 6], [7, 8]))
    long = tokens_policy(pool=EchoPool(context_length=16), on_error="mask")(prompts([5] * 16))
    assert list(long["generation"].finish_reason) == ["error"]


def test_a_setting_that_the_server_would_die_on_is_raised_although_errors_are_masked() -> None:
    class Strict(EchoPool):
        def check(self, ids_B_T: Any, sampling: SamplingParams) -> None:
            if sampling.stop_token_ids:
                raise ConfigError("stop_token_ids holds 10000000")
            super().check(ids_B_T, sampling)

    policy = tokens_policy(pool=Strict(), on_error="mask", generate_kwargs={"stop_token_ids": [10**7]})
    with pytest.raises(ConfigError, match="stop_token_ids holds"):
        policy(prompts([5, 6], [7, 8]))


def test_how_a_response_is_decoded_can_be_set_per_call() -> None:
    tokenizer = make_tokenizer("byte-level")
    pool = EchoPool(vocab_size=len(tokenizer))
    td = TensorDict({("text", "prompt"): "<|im_end|>ab"}, batch_size=1)
    policy = SGLangWrapper(
        pool, tokenizer=tokenizer, input_mode="text", generate_kwargs={"max_tokens": 3, "no_stop_trim": True}
    )
    assert list(policy(td.clone())["text"].response) == ["ba<|im_end|>"]
    assert list(policy(td.clone(), skip_special_tokens=True)["text"].response) == ["ba"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    trimmed = policy(td.clone(), stop_token_ids=[end], include_stop_str_in_output=False)
    assert list(trimmed["text"].response) == ["ba"]
    assert list(policy(td.clone())["text"].response) == ["ba<|im_end|>"]


@pytest.mark.parametrize("inplace", [1, np.bool_(True)])
def test_one_is_true(inplace: Any) -> None:
    td = prompts([5, 6])
    assert tokens_policy(inplace=inplace)(td) is td
    assert "attention_mask" not in tokens_policy(inplace=0)(td)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", ["x", -1, 5, 0.5])
def test_only_the_chosen_tokens_log_prob_can_be_asked_for(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r}: only"):
        tokens_policy(generate_kwargs={name: value})


def test_ids_may_be_numpys() -> None:
    rows = NonTensorStack(NonTensorData([np.int64(5), np.int32(6)]), NonTensorData([7]))
    pool = EchoPool()
    tokens_policy(pool=pool, input_key="ids")(TensorDict({"ids": rows}, batch_size=2))
    assert pool.requests == [[[5, 6], [7]]]
    assert {type(token) for ids in pool.requests[0] for token in ids} == {int}


def test_top_k_of_one_is_greedy_decoding_whatever_the_temperature() -> None:
    sampling = SamplingParams(temperature=0.5, top_k=1)
    assert sampling.to_wire()["temperature"] == 0
    assert not sampling.truncates
    assert sampling.updated(top_k=5).to_wire()["temperature"] == 0.5
    logits, chosen = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([1])
    assert torch.allclose(behaviour_log_probs(logits, chosen, sampling), logits.log_softmax(-1)[:, 1])
    out = tokens_policy(generate_kwargs={"temperature": 0.5, "top_k": 1})(prompts([5, 6]))
    assert out["generation"].temperature.tolist() == [0.0]
    assert out["generation"].exact_log_probs.tolist() == [True]


class Aborting(EchoPool):
    """Aborts the first request while it waits, as a paused server does."""

    def generate(self, ids_B_T: Any, sampling: Any, **kwargs: Any) -> list[GenerateReply]:
        replies = super().generate(ids_B_T, sampling, **kwargs)
        if len(self.requests) > 1:
            return replies
        return [GenerateReply(output_ids=[], output_logprobs=[], prompt_logprobs=[], finish_reason="abort")] * len(
            replies
        )


@pytest.mark.parametrize("max_resumes", [0, 8])
def test_a_response_aborted_while_it_waited_gets_the_log_probs_of_its_prompt(max_resumes: int) -> None:
    replies, _ = generate_resuming(
        Aborting(), [[5, 6, 7]], SamplingParams(max_new_tokens=2), max_resumes=8, prompt_logprobs=True
    )
    assert replies[0].prompt_logprobs == [None, -0.006, -0.007]
    policy = tokens_policy(
        pool=Aborting(), max_resumes=max_resumes, generate_kwargs={"max_tokens": 2, "prompt_logprobs": True}
    )
    out = policy(prompts([5, 6, 7]))
    full = out["log_probs"].get("full", as_list=True)[0]
    expected = [0.0, -0.006, -0.007, -0.007, -0.006] if max_resumes else [0.0, float("nan"), float("nan")]
    assert torch.allclose(full, torch.tensor(expected), equal_nan=True)
    assert len(full) == len(out["tokens"].get("full", as_list=True)[0])


def test_two_names_of_the_same_ids_agree_in_any_container() -> None:
    params = SamplingParams.from_kwargs(eos_token_id=np.array([2, 3]), stop_token_ids=[3, 2])
    assert set(params.stop_token_ids) == {2, 3}
    with pytest.raises(ConfigError, match="two names of one argument"):
        SamplingParams.from_kwargs(eos_token_id=torch.tensor([2]), stop_token_ids=[3])


def test_a_schema_may_be_any_mapping_with_any_kind_of_lists_and_numbers() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    for given in (types.MappingProxyType(schema), omegaconf.OmegaConf.create(schema)):
        assert json.loads(SamplingParams(json_schema=given).to_wire()["json_schema"]) == schema
    assert SamplingParams(json_schema={"minimum": np.int64(1)}).json_schema == '{"minimum": 1}'
    params = SamplingParams(custom_params=omegaconf.OmegaConf.create({"a": [1, 2], "b": {"c": 1}}))
    assert json.loads(json.dumps(params.to_wire()["custom_params"])) == {"a": [1, 2], "b": {"c": 1}}


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens", "max_length"])
@pytest.mark.parametrize("value", [True, 2.5, "30", float("nan")])
def test_the_length_of_a_chats_response_is_an_int(name: str, value: Any) -> None:
    defaults = GenerationDefaults(given={}, checkpoint={}, stop_ids=())
    with pytest.raises(ConfigError, match=f"{name} must be an int"):
        defaults.sampling({name: value}, prompt_length=1, context_length=64)


def test_a_chats_length_has_one_value_and_min_p_is_the_checkpoints() -> None:
    defaults = GenerationDefaults(given={"max_tokens": 7}, checkpoint={"min_p": 0.1}, stop_ids=())
    with pytest.raises(ConfigError, match="two names of one argument"):
        defaults.sampling({"max_new_tokens": 5, "max_tokens": 6}, prompt_length=1, context_length=64)
    params = defaults.sampling({"max_new_tokens": 5}, prompt_length=1, context_length=64)
    assert (params.max_new_tokens, params.min_p) == (5, 0.1)


@pytest.mark.parametrize("mask", [[[0.0, 1.0], [1.0, 1.0]], [[False, True], [True, True]], [[0, 1], [1, 1]]])
def test_a_mask_of_any_type_says_what_is_a_token(mask: Any) -> None:
    pool, td = EchoPool(), prompts([5, 6], [7, 8])
    tokens_policy(pool=pool)(td.set("attention_mask", torch.tensor(mask)))
    assert pool.requests == [[[6], [7, 8]]]


@pytest.mark.parametrize("value", [-1e9, -float("inf"), 2])
def test_a_mask_that_is_added_to_attention_scores_is_refused(value: float) -> None:
    td = prompts([5, 6], [7, 8]).set("attention_mask", torch.tensor([[value, 0.0], [0.0, 0.0]]))
    with pytest.raises(ConfigError, match="'attention_mask' holds other values than 0 and 1"):
        tokens_policy()(td)


def test_the_support_of_a_response_outlives_a_part_without_tokens() -> None:
    part = {"support_ids": [[5, 6]], "support_logprobs": [-0.5], "output_logprobs": [-1.0]}
    answers = [
        GenerateReply(output_ids=[], output_logprobs=[], finish_reason="abort"),
        GenerateReply(output_ids=[5], finish_reason="abort", **part),
        GenerateReply(output_ids=[], output_logprobs=[], finish_reason="abort"),
        GenerateReply(output_ids=[6], finish_reason="stop", **part),
    ]

    class Scripted(EchoPool):
        def generate(self, *_: Any, **__: Any) -> list[GenerateReply]:
            return [answers.pop(0)]

    sampling = SamplingParams(max_new_tokens=4, top_k=2, sampling_mask=True)
    (reply,), resumes = generate_resuming(Scripted(), [[1]], sampling, max_resumes=8)
    assert (reply.output_ids, reply.support_ids, reply.support_logprobs) == ([5, 6], [[5, 6], [5, 6]], [-0.5, -0.5])
    assert resumes == [3]


def test_a_tokenizer_that_would_make_several_rows_of_a_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="return_overflowing_tokens"):
        SGLangWrapper(EchoPool(), input_mode="text", tokenizer_kwargs={"return_overflowing_tokens": True})


@pytest.mark.parametrize("label", ["1", -1, True, 0.5])
def test_a_reward_models_label_is_an_index(label: Any) -> None:
    with pytest.raises(ConfigError, match="label must be"):
        RewardModel("http://127.0.0.1:9", label=label)
