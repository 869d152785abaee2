"""Unknown arguments are refused with what to write instead: the nearest name, or the counterpart of a foreign name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tensordict import TensorDict

from torchrl_sglang import (
    AsyncSGLang,
    ClientConfig,
    ConfigError,
    RouterConfig,
    SamplingParams,
    ServerConfig,
    SGLangWeightSyncScheme,
    SGLangWrapper,
    SyncConfig,
)
from torchrl_sglang.chat.defaults import GenerationDefaults
from torchrl_sglang.config import foreign_names
from torchrl_sglang.engine.launching import server_configs
from torchrl_sglang.testing import EchoPool

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    "Engine": foreign_names.ENGINE_ARGUMENTS,
    "Connect": foreign_names.CONNECT_ARGUMENTS,
    "Generation": foreign_names.GENERATION_ARGUMENTS,
    "Policy": foreign_names.POLICY_ARGUMENTS,
    "Weight sync scheme": foreign_names.SCHEME_ARGUMENTS,
}
ASKED_FOR = (
    *("enable_lora", "max_num_seqs", "enforce_eager", "enable_prefix_caching", "trust_remote_code", "quantization"),
    "seed",
)


def refuse_policy(**given: Any) -> None:
    SGLangWrapper(EchoPool(), **given)


def refuse_engine(**given: Any) -> None:
    AsyncSGLang.from_pretrained("model", **given)


def refuse_connect(**given: Any) -> None:
    AsyncSGLang.connect("http://host:1", **given)


def refuse_scheme(**given: Any) -> None:
    SGLangWeightSyncScheme("http://host:1", **given)


def refuse_generation(**given: Any) -> None:
    SGLangWrapper(EchoPool(), generate_kwargs=given)


@pytest.mark.parametrize(
    ("table", "call"),
    [
        (TABLES["Engine"], refuse_engine),
        (TABLES["Connect"], refuse_connect),
        (TABLES["Generation"], refuse_generation),
        (TABLES["Policy"], refuse_policy),
        (TABLES["Weight sync scheme"], refuse_scheme),
    ],
)
def test_every_foreign_name_is_answered_with_its_counterpart(table: Mapping[str, str], call: Any) -> None:
    for name, hint in table.items():
        with pytest.raises(ConfigError) as caught:
            call(**{name: 1})
        assert repr(name) in str(caught.value)
        assert hint.replace("`", "")[1:] in str(caught.value)


def test_the_arguments_that_vllms_users_pass_most_are_in_the_tables() -> None:
    assert set(ASKED_FOR) <= set(foreign_names.ENGINE_ARGUMENTS)
    assert {"best_of", "guided_decoding", "detokenize"} <= set(foreign_names.GENERATION_ARGUMENTS)


def test_no_foreign_name_is_accepted_as_well() -> None:
    accepted = {field.name for record in (ServerConfig, SamplingParams) for field in fields(record)}
    accepted -= {"api_key"}
    assert not accepted & set(foreign_names.ENGINE_ARGUMENTS)
    assert not accepted & set(foreign_names.GENERATION_ARGUMENTS)


def test_the_migration_page_shows_the_tables() -> None:
    page = (ROOT / "docs" / "migration.md").read_text()
    rows = [f"| `{name}` | {hint} |" for table in TABLES.values() for name, hint in table.items()]
    missing = [row for row in rows if row not in page.replace("\\|", "|")]
    assert "\n".join(missing) == "", "docs/migration.md lacks these rows of torchrl_sglang/config/foreign_names.py"


def test_sglang_knows_the_flags_of_the_tables() -> None:
    sources = sglang_sources()
    if not sources:
        pytest.skip("SGLang is not installed in this environment")
    text = "\n".join(path.read_text() for path in sources)
    flags = {
        flag for table in TABLES.values() for hint in table.values() for flag in re.findall(r'"--([a-z0-9-]+)"', hint)
    }
    assert len(flags) > 25
    unknown = [flag for flag in sorted(flags) if f"--{flag}" not in text and flag.replace("-", "_") not in text]
    assert unknown == []


def sglang_sources() -> list[Path]:
    """The files that define SGLang's command line; found without importing it."""
    from importlib.util import find_spec

    spec = find_spec("sglang")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "srt"
    return [folder / "server_args.py", *(folder / "arg_groups").rglob("*.py")]


@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        (refuse_policy, {"max_new_tokens": 5}, r"It belongs into generate_kwargs=\{'max_new_tokens': ...\}"),
        (refuse_policy, {"best_of": 5}, "It belongs into generate_kwargs="),
        (refuse_policy, {"tp_size": 2}, r"It belongs into AsyncSGLang.from_pretrained\(...\)"),
        (refuse_policy, {"enforce_eager": True}, r"It belongs into AsyncSGLang.from_pretrained"),
        (refuse_policy, {"input_mod": "text"}, "Did you mean 'input_mode'"),
        (refuse_engine, {"temperature": 0.5}, "It belongs into SamplingParams or generate_kwargs"),
        (refuse_engine, {"connect_timeout_s": 1}, r"It belongs into client=ClientConfig\(connect_timeout_s=...\)"),
        (refuse_engine, {"transport": "disk"}, r"config=SyncConfig\(transport=...\)"),
        (refuse_engine, {"contxt_length": 1}, "Did you mean 'context_length'"),
        (refuse_scheme, {"bucket_bytes": 1}, r"It belongs into config=SyncConfig\(bucket_bytes=...\)"),
        (refuse_connect, {"tp_size": 2}, r"It belongs into AsyncSGLang.from_pretrained\(...\), which launches servers"),
        (refuse_connect, {"enforce_eager": True}, "which launches servers"),
        (refuse_connect, {"max_new_tokens": 5}, "It belongs into SamplingParams"),
        (refuse_connect, {"apikey": "a"}, "Did you mean 'api_key'"),
        (refuse_scheme, {"modle": 1}, "Did you mean 'model'"),
    ],
)
def test_a_name_of_another_call_is_sent_there(call: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(**given)


@pytest.mark.parametrize(
    ("record", "given", "message"),
    [
        (SyncConfig, {"trasport": "disk"}, "SyncConfig has no argument 'trasport'. Did you mean 'transport'"),
        (ClientConfig, {"apikey": "a"}, "Did you mean 'api_key'"),
        (RouterConfig, {"polcy": "random"}, "Did you mean 'policy'"),
        (ServerConfig, {"model": "m", "enforce_eager": True}, "--disable-cuda-graph"),
        (SamplingParams, {"max_tokens": 3}, "It is called max_new_tokens; SamplingParams.from_kwargs"),
        (SamplingParams, {"best_of": 3}, "Use num_samples"),
    ],
)
def test_a_record_of_settings_suggests_names_too(record: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        record(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"max_tokens": 2, "max_new_tokens": 5},
        {"min_tokens": 2, "min_new_tokens": 1},
        {"n": 2, "num_return_sequences": 3},
        {"stop": "a", "stop_strings": ["b"]},
        {"stop_sequences": ["a"], "stop_strings": ["b"]},
        {"eos_token_id": 2, "stop_token_ids": [3]},
        {"seed": 1, "sampling_seed": 2},
        {"include_stop_str_in_output": True, "no_stop_trim": False},
    ],
)
def test_two_names_of_one_argument_with_different_values_are_refused(given: dict[str, Any]) -> None:
    for order in (given, dict(reversed(given.items()))):
        with pytest.raises(ConfigError, match="two names of one argument with different values: give one") as caught:
            SamplingParams.from_kwargs(**order)
        assert all(f"{name}={value!r}" in str(caught.value) for name, value in given.items())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_tokens": 5, "max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": None, "max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"stop": "a", "stop_strings": ["a"]}, {"stop": ("a",)}),
        ({"stop": ["a", "b"], "stop_sequences": ("b", "a")}, {"stop": ("b", "a")}),
        ({"eos_token_id": 2, "stop_token_ids": [2]}, {"stop_token_ids": (2,)}),
    ],
)
def test_two_names_with_one_value_are_one_argument(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert SamplingParams.from_kwargs(**given) == SamplingParams(**expected)


def test_sampling_and_greedy_decoding_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="do_sample=True samples, but temperature=0 is greedy"):
        SamplingParams.from_kwargs(do_sample=True, temperature=0)
    greedy = SamplingParams(temperature=0)
    with pytest.raises(ConfigError, match="give a temperature"):
        greedy.updated(do_sample=True)
    assert greedy.updated(do_sample=True, temperature=0.5).temperature == 0.5


@pytest.mark.parametrize("n", [{"n": 1}, {"n": 3}, {"num_return_sequences": 1}])
def test_num_samples_and_another_n_are_refused(n: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="num_samples=2 differs from"):
        SGLangWrapper(EchoPool(), input_mode="tokens", num_samples=2, generate_kwargs=n)
    assert SGLangWrapper(EchoPool(), input_mode="tokens", num_samples=2, generate_kwargs={"n": 2}).num_samples == 2


def test_two_chat_templates_are_refused() -> None:
    with pytest.raises(ConfigError, match="two ways to choose the chat template: give one"):
        SGLangWrapper(EchoPool(), chat_template="{{ messages }}", chat_template_name="qwen")


def test_one_launch_argument_under_two_names_is_refused() -> None:
    with pytest.raises(ConfigError, match="give one"):
        server_configs("m", tp_size=1, dp_size=1, gpus=None, given={"max_model_len": 1, "context_length": 2})
    (config,) = server_configs("m", tp_size=1, dp_size=1, gpus=None, given={"num_devices": 2, "device": "cpu"})
    assert config.tp_size == 2


def test_sampling_parameters_of_another_library_are_refused(fake: Any) -> None:
    class Foreign:
        temperature = 0.5

    with AsyncSGLang.connect(fake.url) as servers:
        assert servers.generate("hello", SamplingParams(max_new_tokens=2)).completion_tokens == 2  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match="must be a torchrl_sglang.SamplingParams or a dict, got Foreign"):
            servers.generate("hello", Foreign())  # type: ignore[arg-type]


def test_a_wrong_name_in_one_call_is_refused_before_anything_is_sent() -> None:
    policy = SGLangWrapper(EchoPool(), input_mode="tokens")
    with pytest.raises(ConfigError, match="Use num_samples"):
        policy(TensorDict(batch_size=[0]), best_of=2)


def test_a_chat_refuses_two_lengths_too() -> None:
    defaults = GenerationDefaults(given={"max_tokens": 7}, checkpoint={}, stop_ids=(2,))
    sizes = {"prompt_length": 4, "context_length": 64}
    with pytest.raises(ConfigError, match="max_new_tokens=5 and max_tokens=2 are two names of one argument"):
        defaults.sampling({"max_tokens": 2, "max_new_tokens": 5}, **sizes)
    assert defaults.sampling({"max_new_tokens": 5}, **sizes).max_new_tokens == 5  # a call replaces the chat's own
    assert defaults.sampling({}, **sizes).max_new_tokens == 7
