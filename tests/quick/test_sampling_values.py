"""Sampling settings reach SGLang as the types that its decoder has, or are refused before anything is sent."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from torchrl_sglang import ConfigError, SamplingParams
from torchrl_sglang.protocol.launch_flags import refuse_launch_flags
from torchrl_sglang.protocol.limits import check_sampling
from torchrl_sglang.protocol.messages import HttpRequest, ServerInfo
from torchrl_sglang.protocol.router import router_forwards

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
HOST = "http://host"


@pytest.mark.parametrize(
    ("field", "given", "sent"),
    [
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", torch.tensor(0.5), 0.5),
        ("temperature", np.int64(1), 1),
        ("max_new_tokens", np.int32(7), 7),
        ("top_k", torch.tensor(5), 5),
        ("ignore_eos", np.bool_(True), True),
        ("stop_token_ids", np.array([3, 4]), [3, 4]),
        ("stop_token_ids", torch.tensor([3, 4]), [3, 4]),
        ("stop_token_ids", torch.tensor(3), [3]),
        ("stop_token_ids", {3}, [3]),
        ("stop_token_ids", [np.int64(3)], [3]),
        ("stop", ["a", "b"], ["a", "b"]),
        ("logit_bias", {5: 1}, {"5": 1}),
        ("logit_bias", {np.int64(5): np.float32(0.5)}, {"5": 0.5}),
        ("logit_bias", {"5": -math.inf}, {"5": -1e6}),
        ("logit_bias", {}, None),
        ("sampling_seed", np.int64(7), 7),
        ("regex", re.compile("a+"), "a+"),
        ("regex", "", None),
        ("stop_regex", re.compile("x+"), ["x+"]),
        ("json_schema", json.dumps(SCHEMA), json.dumps(SCHEMA)),
        ("json_schema", "$$ANY$$", "$$ANY$$"),
        ("json_schema", True, "true"),
        ("custom_params", {"a": (1, None), "b": {"c": np.float64(0.5)}}, {"a": [1, None], "b": {"c": 0.5}}),
        ("top_k", 2**40, -1),
        ("temperature", 1e-7, 0.0),
    ],
)
def test_a_value_with_one_meaning_is_converted(field: str, given: Any, sent: Any) -> None:
    params = SamplingParams(**{field: given})
    wire = json.loads(json.dumps(params.to_wire()))
    assert wire[field] == sent
    assert type(wire[field]) is type(sent)
    assert params.updated() == params


@pytest.mark.parametrize("field", ["json_schema", "structural_tag"])
def test_a_schema_given_as_an_object_is_sent_as_json_text(field: str) -> None:
    sent = SamplingParams(**{field: SCHEMA}).to_wire()[field]
    assert isinstance(sent, str)
    assert json.loads(sent) == SCHEMA


def test_a_model_class_stands_for_its_schema() -> None:
    class Answer:
        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return SCHEMA

    params = SamplingParams(json_schema=Answer)  # type: ignore[arg-type]
    assert json.loads(params.to_wire()["json_schema"]) == SCHEMA


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("regex", 5),
        ("regex", b"a"),
        ("regex", "\0"),
        ("regex", "\ud800"),
        ("regex", "(" * 500 + ")" * 500),
        ("ebnf", ["root"]),
        ("json_schema", "{"),
        ("json_schema", "5"),
        ("json_schema", [SCHEMA]),
        ("json_schema", {"a": {1, 2}}),
        ("json_schema", {"minimum": math.nan}),
        ("json_schema", {"pattern": "\0"}),
        ("json_schema", '{"pattern": "\\u0000"}'),
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
        ("structural_tag", "[]"),
        ("structural_tag", True),
        ("logit_bias", {5: None}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", {5: True}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: math.inf}),
        ("logit_bias", {5: 1e39}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {5.0: 1.0}),
        ("logit_bias", {5: 1.0, "5": 2.0}),
        ("logit_bias", [5]),
        ("stop", 5),
        ("stop", [None]),
        ("stop", "\ud800"),
        ("stop", [f"s{i}" for i in range(33)]),
        ("stop_regex", "("),
        ("stop_regex", re.compile("a", re.IGNORECASE)),
        ("regex", re.compile(b"a")),
        ("stop_regex", "a" * 300),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [None]),
        ("stop_token_ids", 2**40),
        ("max_new_tokens", 2**40),
        ("n", 10**9),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("temperature", 1e300),
        ("repetition_penalty", 1e-30),
        ("ignore_eos", 1),
        ("no_stop_trim", "yes"),
        ("sampling_seed", 2**63),
        ("sampling_seed", "7"),
        ("custom_params", {"a": {"b": {"c": 1}}}),
        ("custom_params", {"a": [[1]]}),
        ("custom_params", {"a": object()}),
        ("custom_params", {"a": 2**64}),
        ("custom_params", {5: 1}),
        ("custom_params", {"__sglang_reasoning_in_grammar": True}),
        ("custom_params", [1]),
    ],
)
def test_a_value_that_sglang_could_not_decode_is_refused_by_name(field: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: bad})


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(a+)+b", "(?:a*)*$", r"(\w+\s*)+x", "((a+))*", "(a|b+)+", "x(?:(a{1,99})?)*"]
)
def test_an_expression_that_would_hang_the_scheduler_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="repeats a repetition"):
        SamplingParams(stop_regex=pattern)


@pytest.mark.parametrize(
    "pattern", ["a+", r"(\d+,)*", r"\n\n+User:", "(a|b)+", "(ab?c)*", "(?:a{1,3})+", r"[^\n]*\n", "(a+)?"]
)
def test_other_expressions_are_taken(pattern: str) -> None:
    assert SamplingParams(stop_regex=pattern).stop_regex == (pattern,)


def test_the_callers_bias_is_copied() -> None:
    bias = {5: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[6] = 2.0
    assert params.logit_bias == {"5": 1.0}


# ------------------------------------------------------------------------------------- what a server supports


def info(**fields: Any) -> ServerInfo:
    return ServerInfo(url=HOST, version="0.5.23", model_path="m", tokenizer_path="m", **fields)


@pytest.mark.parametrize(
    ("settings", "server", "message"),
    [
        ({"stop_token_ids": [10**7], "min_new_tokens": 4}, {}, "stop_token_ids holds 10000000.*320 ids"),
        ({"stop_token_ids": [320]}, {}, "stop_token_ids holds 320"),
        ({"logit_bias": {320: 1.0}}, {}, "logit_bias names token id 320"),
        ({"regex": "a"}, {"grammar_backend": "none"}, "regex needs a grammar backend"),
        ({"sampling_seed": 7}, {}, "seed=7: http://host would ignore it"),
        ({"stop": "a"}, {"skips_tokenizer": True}, "stop needs the server's tokenizer"),
        ({"min_new_tokens": 1}, {"skips_tokenizer": True}, "min_new_tokens needs the server's tokenizer"),
    ],
)
def test_a_setting_that_a_server_can_not_honour_is_refused(settings: dict, server: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sampling(SamplingParams(**settings), vocab_size=320, info=info(**server))


def test_ids_within_the_vocabulary_pass() -> None:
    settings = SamplingParams(stop_token_ids=[319], logit_bias={319: 1.0}, min_new_tokens=4, regex="a")
    check_sampling(settings, vocab_size=320, info=info(grammar_backend="xgrammar"))


@pytest.mark.parametrize(
    "flags",
    [
        {"preferred_sampling_params": '{"temperature": 0.6, "beam_width": 4}'},
        {"preferred_sampling_params": "[]x"},
        {"enable_watermark": True, "watermark_default_enabled": True},
        {"enable_watermark": True, "watermark_default_enabled": False, "watermark_enforce_all": True},
        {"speculative_algorithm": "EAGLE", "speculative_accept_threshold_single": 0.5},
    ],
)
def test_a_server_whose_flags_change_responses_beyond_a_requests_reach_is_refused(flags: dict) -> None:
    with pytest.raises(ConfigError, match="http://host was launched with"):
        refuse_launch_flags(flags, url=HOST)


@pytest.mark.parametrize(
    "flags",
    [
        {"preferred_sampling_params": '{"temperature": 0.6, "top_k": 5, "stream_interval": 4}'},
        {"enable_watermark": True, "watermark_default_enabled": False},
        {"speculative_algorithm": "EAGLE", "speculative_accept_threshold_single": 1.0},
    ],
)
def test_flags_that_requests_override_are_accepted(flags: dict) -> None:
    refuse_launch_flags(flags, url=HOST)


def test_the_router_may_drop_a_default_unless_the_server_fills_in_another_value() -> None:
    body = {"input_ids": [[1]], "sampling_params": SamplingParams().to_wire()}
    request = HttpRequest(method="POST", path="/generate", body=body)
    assert router_forwards(request)
    assert router_forwards(request, filled_in={"temperature"})  # always forwarded
    assert not router_forwards(request, filled_in={"regex"})  # the router drops `null`
    body["sampling_params"] = SamplingParams(stop_regex="x").to_wire()
    assert not router_forwards(request)
