"""The settings check themselves: every rule, with values that are refused and values that are accepted."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from torchrl_sglang import ClientConfig, SamplingParams, ServerConfig, SyncConfig
from torchrl_sglang.config import nearest_name
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.protocol.generate import build_generate

KEY = "s3cret-key"
CONFIGS = [
    SamplingParams(max_new_tokens=4, stop=("a",), logit_bias={"5": 1.0}),
    ClientConfig(api_key=KEY, admin_api_key=KEY),
    ServerConfig(model="m", api_key=KEY, admin_api_key=KEY, env={"A": "1"}, log_dir=Path("logs")),
    SyncConfig(ignore=("*.bias",), name_map={"a": "b"}),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
class TestEveryConfig:
    def test_pickles(self, config):
        assert pickle.loads(pickle.dumps(config)) == config

    def test_is_frozen(self, config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, 1)

    def test_takes_keywords_only(self, config):
        with pytest.raises(TypeError, match="positional"):
            type(config)("m")

    def test_never_shows_a_key(self, config):
        assert KEY not in repr(config)
        assert KEY not in str(config)

    def test_documents_every_field(self, config):
        import inspect

        source = inspect.getsource(type(config)).splitlines()
        for field in dataclasses.fields(config):
            at = next(i for i, line in enumerate(source) if line.startswith(f"    {field.name}:"))
            assert source[at + 1].startswith('    """'), f"{field.name} has no docstring"


# ---------------------------------------------------------------------------------------------------- SamplingParams


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("max_new_tokens", None),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("n", 0),
        ("n", "2"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", 0),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.1),
        ("stop", ""),
        ("stop", ("a", "")),
        ("stop", (1,)),
        ("stop_regex", ("",)),
        ("stop_token_ids", ("a",)),
        ("stop_token_ids", -1),
    ],
)
def test_a_sampling_value_that_cannot_be_honoured_is_refused_by_name(field: str, bad: object):
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: bad})


@pytest.mark.parametrize(
    ("field", "good"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", 128),
        ("temperature", 0),
        ("temperature", 0.0),
        ("top_p", 1),
        ("top_p", 1e-6),
        ("top_k", 1),
        ("min_p", 0),
        ("min_p", 1),
        ("frequency_penalty", -2),
        ("presence_penalty", 2),
        ("repetition_penalty", 2),
        ("stop_token_ids", 0),
    ],
)
def test_values_at_the_limits_are_accepted(field: str, good: object):
    SamplingParams(**{field: good})


def test_only_one_grammar_constrains_a_response():
    SamplingParams(regex="a+")
    with pytest.raises(ConfigError, match="regex and json_schema"):
        SamplingParams(regex="a+", json_schema="{}")


def test_one_stop_becomes_a_tuple_of_one():
    params = SamplingParams(stop="END", stop_token_ids=2, stop_regex="x+")
    assert (params.stop, params.stop_token_ids, params.stop_regex) == (("END",), (2,), ("x+",))
    assert SamplingParams(stop=None, stop_token_ids=[2, 3]) == SamplingParams(stop_token_ids=(2, 3))


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"min_tokens": 5}, {"min_new_tokens": 5}),
        ({"num_return_sequences": 3}, {"n": 3}),
        ({"stop_sequences": ["a"]}, {"stop": ("a",)}),
        ({"stop_strings": "a"}, {"stop": ("a",)}),
        ({"eos_token_id": [1, 2]}, {"stop_token_ids": (1, 2)}),
        ({"seed": 7}, {"sampling_seed": 7}),
        ({"include_stop_str_in_output": True}, {"no_stop_trim": True}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}),
        ({"top_k": 0}, {"top_k": -1}),
        ({"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}, {}),
        ({"temperature": None, "max_tokens": None}, {}),
        ({"max_tokens": 5, "max_new_tokens": 5}, {"max_new_tokens": 5}),
    ],
)
def test_other_ecosystems_names_mean_the_same(kwargs: dict, expected: dict):
    assert SamplingParams.from_kwargs(**kwargs) == SamplingParams(**expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temprature": 1.0}, "'temprature'. Did you mean 'temperature'?"),
        ({"max_token": 1}, "'max_token'. Did you mean 'max_tokens'?"),
        ({"quux": 1}, r"unknown generation argument 'quux'\.$"),
        ({"num_beams": 4}, "no beam search: num_beams=4"),
        ({"length_penalty": 0.5}, "no beam search: length_penalty"),
        ({"early_stopping": True}, "no beam search: early_stopping"),
        ({"do_sample": False, "temperature": 0.7}, "do_sample=False is greedy"),
        ({"max_tokens": -1}, "max_new_tokens must be at least 0"),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_never_dropped(kwargs: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        SamplingParams.from_kwargs(**kwargs)


def test_updating_keeps_the_rest_and_checks_again():
    params = SamplingParams(max_new_tokens=16, top_p=0.9)
    assert params.updated(max_tokens=4) == SamplingParams(max_new_tokens=4, top_p=0.9)
    assert params.updated() == params
    with pytest.raises(ConfigError, match="top_p"):
        params.updated(top_p=2)


def test_to_wire_states_every_field_since_servers_may_fill_in_what_is_left_out():
    params = SamplingParams(stop="a", stop_token_ids=[2], logit_bias={"3": -1.0}, temperature=0, top_k=5)
    wire = params.to_wire()
    fields = {field.name for field in dataclasses.fields(SamplingParams)} - {"sampling_mask"}
    assert wire.keys() == SamplingParams().to_wire().keys() == fields
    given = {"stop": ["a"], "stop_token_ids": [2], "logit_bias": {"3": -1.0}, "temperature": 0, "top_k": 5}
    assert wire == SamplingParams().to_wire() | given
    assert json.loads(json.dumps(wire)) == wire


def test_every_field_reaches_the_wire_under_its_own_name():
    values = {
        "max_new_tokens": 9, "min_new_tokens": 1, "n": 2, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1,
        "frequency_penalty": 0.1, "presence_penalty": 0.1, "repetition_penalty": 1.1, "stop": ("a",),
        "stop_token_ids": (1,), "stop_regex": ("b",), "ignore_eos": True, "skip_special_tokens": False,
        "spaces_between_special_tokens": False, "no_stop_trim": True, "logit_bias": {"1": 1.0}, "sampling_seed": 1,
        "custom_params": {"a": 1},
    }  # fmt: skip
    grammars = {"regex", "json_schema", "ebnf", "structural_tag"}  # one at a time
    beside = {"sampling_mask"}  # a field of the request, beside the sampling parameters
    assert set(values) | grammars | beside == {field.name for field in dataclasses.fields(SamplingParams)}
    assert build_generate([[1]], SamplingParams(sampling_mask=True)).body["return_sampling_mask"] is True
    wire = SamplingParams(**values).to_wire()
    assert {name for name, value in wire.items() if value != SamplingParams().to_wire()[name]} == set(values)
    for grammar in grammars:
        assert SamplingParams(**{grammar: "{}"}).to_wire()[grammar] == "{}"


@pytest.mark.parametrize(
    ("kwargs", "truncates", "penalises"),
    [
        ({}, False, False),
        ({"top_p": 0.9}, True, False),
        ({"top_k": 5}, True, False),
        ({"min_p": 0.1}, True, False),
        ({"top_p": 0.9, "temperature": 0}, False, False),
        ({"temperature": 0.5}, False, False),
        ({"frequency_penalty": 0.1}, False, True),
        ({"presence_penalty": -0.1}, False, True),
        ({"repetition_penalty": 1.1}, False, True),
        ({"logit_bias": {"1": 1.0}}, False, True),
    ],
)
def test_truncates_and_penalises_tell_what_changes_the_distribution(kwargs: dict, truncates: bool, penalises: bool):
    params = SamplingParams(**kwargs)
    assert (params.truncates, params.penalises) == (truncates, penalises)


# ------------------------------------------------------------------------------------- ClientConfig and ServerConfig


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(ClientConfig) if field.name.endswith("_timeout_s")]
)
@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_client_time_out_is_a_positive_number(field: str, bad: object):
    with pytest.raises(ConfigError, match=f"{field} must be positive"):
        ClientConfig(**{field: bad})


@pytest.mark.parametrize(
    ("field", "bad"), [("max_connections", 0), ("connect_retries", -1), ("vocab_size", 0), ("vocab_size", -5)]
)
def test_a_client_setting_that_makes_no_sense_is_refused(field: str, bad: object):
    with pytest.raises(ConfigError, match=field):
        ClientConfig(**{field: bad})


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("model", ""),
        ("tp_size", 0),
        ("device", "tpu"),
        ("port", 0),
        ("port", 65536),
        ("gpus", (0, 1)),
        ("context_length", 0),
        ("max_total_tokens", -1),
        ("mem_fraction_static", 0.0),
        ("mem_fraction_static", 1.0),
        ("start_timeout_s", 0),
        ("start_timeout_s", float("nan")),
        ("stop_timeout_s", -1),
        ("extra_args", "--enable-lora"),
        ("env", {"OMP_NUM_THREADS": 1}),
    ],
)
def test_a_server_setting_that_makes_no_sense_is_refused(field: str, bad: object):
    with pytest.raises(ConfigError, match=field):
        ServerConfig(**{"model": "m", field: bad})


@pytest.mark.parametrize("words", [("--api-key", KEY), (f"--api-key={KEY}",), ("--admin-api-key", KEY)])
def test_a_key_on_the_command_line_is_refused_without_repeating_it(words: tuple[str, ...]):
    with pytest.raises(ConfigError, match="api_key=") as caught:
        ServerConfig(model="m", extra_args=words)
    assert KEY not in str(caught.value)


def test_a_server_config_keeps_words_and_paths_in_their_own_types():
    config = ServerConfig(model="m", extra_args=["--max-running-requests", 4], log_dir="logs", stop_timeout_s=0)
    assert config.extra_args == ("--max-running-requests", "4")
    assert config.log_dir == Path("logs")


# -------------------------------------------------------------------------------------------------------- SyncConfig


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("transport", "pigeon"),
        ("backend", "mpi"),
        ("cache", "keep"),
        ("groups", "many"),
        ("pause", "no"),
        ("cache", "forget"),
        ("verify", "maybe"),
        ("bucket_bytes", 0),
        ("group_timeout_s", 0),
        ("fixed_timeout_s", -1),
        ("assumed_bytes_per_s", 0),
        ("verify_atol", 0),
        ("verify_atol", float("nan")),
        ("master_port", 0),
        ("master_port", 70000),
        ("ignore", "lm_head"),
    ],
)
def test_a_sync_setting_that_cannot_be_honoured_is_refused_by_name(field: str, bad: object):
    with pytest.raises(ConfigError, match=field):
        SyncConfig(**{field: bad})


def test_the_disk_transport_needs_a_folder():
    with pytest.raises(ConfigError, match="disk_dir"):
        SyncConfig(transport="disk")
    assert SyncConfig(transport="disk", disk_dir="shared").disk_dir == Path("shared")


def test_a_deadline_grows_with_the_bytes():
    config = SyncConfig(fixed_timeout_s=10, assumed_bytes_per_s=100)
    assert config.deadline_s(0) == 10
    assert config.deadline_s(1000) == 20


# ------------------------------------------------------------------------------------------------------- nearest_name


def test_the_nearest_name_is_offered_only_when_one_is_similar():
    assert nearest_name("temprature", ["temperature", "top_p"]) == " Did you mean 'temperature'?"
    assert nearest_name("zzz", ["temperature", "top_p"]) == ""
