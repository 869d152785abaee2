"""SGLangWrapper has the attributes and output keys of TorchRL's own wrappers."""

from __future__ import annotations

import ast
import inspect
import pickle
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch.utils.data import DataLoader
from torchrl.collectors import Collector
from torchrl.data import Composite, Unbounded
from torchrl.data.llm import History
from torchrl.envs import Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm.policies import ChatHistory, LLMWrapperBase, TransformersWrapper, vLLMWrapper
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchrl_sglang import ConfigError, SGLangWrapper
from torchrl_sglang.testing.echo_pool import EchoPool

pytestmark = pytest.mark.torchrl

# Public names of TorchRL's wrappers that SGLangWrapper does not have.
NOT_OURS = {
    "get_dist_with_prompt_mask",  # a distribution over logits; vLLMWrapper raises NotImplementedError
    "CompletionOutput_tc",  # vLLMWrapper: a TensorClass of vLLM's own output type
    "repeat_interleave_causal",  # TransformersWrapper: packs sequences for a model's forward pass
}


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model(arch="llama", seed=0)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def ours(tokenizer: Any, **kwargs: Any) -> SGLangWrapper:
    return SGLangWrapper(EchoPool(), tokenizer=tokenizer, **{"generate_kwargs": {"max_new_tokens": 3}, **kwargs})


def question() -> TensorDict:
    history = History.from_chats([[{"role": "user", "content": "dog"}]])
    return TensorDict(history=ChatHistory(prompt=history, batch_size=[1]), batch_size=[1])


def assigned_attributes(cls: type) -> set[str]:
    """Names that the class's methods assign on ``self``: vLLMWrapper can't be instantiated without vLLM."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def public_attributes(*sources: Any) -> set[str]:
    return {name for source in sources for name in source if not name.startswith("_")}


def test_every_public_attribute_of_torchrls_wrappers_can_be_read(model: Any, tokenizer: Any) -> None:
    policy = ours(tokenizer)
    instance = TransformersWrapper(model, tokenizer=tokenizer)
    expected = public_attributes(
        vars(instance),
        dir(instance),
        dir(vLLMWrapper),
        *(assigned_attributes(cls) for cls in (vLLMWrapper, TransformersWrapper)),
        LLMWrapperBase.__annotations__,
    )
    assert {"return_text", "padding_value", "sampling_params", "out_keys"} <= expected, "the lists were not found"
    missing = set()
    for name in expected - NOT_OURS:
        try:
            getattr(policy, name)
        except NotImplementedError:
            pass  # dist_params_keys: so it is in TorchRL's base class
        except AttributeError:
            missing.add(name)
    assert missing == set()


@pytest.mark.parametrize("return_log_probs", [None, True, False])
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_keys_and_return_flags_equal_those_of_transformers_wrapper(
    model: Any, tokenizer: Any, mode: str, generate: bool, return_log_probs: bool | None
) -> None:
    settings = {"input_mode": mode, "generate": generate, "return_log_probs": return_log_probs}
    if not generate and return_log_probs is False:
        with pytest.raises(ValueError, match="return_log_probs must be True"):
            TransformersWrapper(model, tokenizer=tokenizer, **settings)
        with pytest.raises(ValueError, match="return_log_probs must be True"):
            ours(tokenizer, **settings)
        return
    reference, policy = TransformersWrapper(model, tokenizer=tokenizer, **settings), ours(tokenizer, **settings)
    for name in ("in_keys", "out_keys", "input_key", *(n for n in vars(reference) if n.startswith("return_"))):
        assert getattr(policy, name) == getattr(reference, name), name


def test_settings_are_read_only_attributes_and_new_versions_have_new_ones(tokenizer: Any) -> None:
    policy = ours(tokenizer, tokenizer_kwargs={"add_special_tokens": False})
    for name in ("pad_output", "inplace", "num_samples", "generate_kwargs", "history_key", "sampling_params"):
        with pytest.raises(AttributeError, match=rf"'{name}' is fixed .*get_new_version"):
            setattr(policy, name, None)
    with pytest.raises(AttributeError):
        policy.return_tokens = False
    with pytest.raises(TypeError, match="does not support item assignment"):
        policy.generate_kwargs["max_new_tokens"] = 5
    longer = policy.get_new_version(generate_kwargs={**policy.generate_kwargs, "max_new_tokens": 5})
    assert (policy.sampling_params.max_new_tokens, longer.sampling_params.max_new_tokens) == (3, 5)
    assert longer.tokenizer_kwargs == {"add_special_tokens": False}
    other = object()
    policy.set_tokenizer(other)
    assert policy.tokenizer is other
    assert policy.get_new_version(pad_output=True).tokenizer is other


def test_settings_do_not_change_with_the_callers_arguments(tokenizer: Any) -> None:
    given = {"max_new_tokens": 3}
    policy = ours(tokenizer, generate_kwargs=given)
    given["max_new_tokens"] = 7
    assert policy.generate_kwargs == {"max_new_tokens": 3}
    assert policy.get_new_version().sampling_params.max_new_tokens == 3


def test_a_missing_tokenizer_is_named_and_not_reported_as_a_missing_attribute() -> None:
    with pytest.raises(ConfigError, match="pass tokenizer="):
        _ = SGLangWrapper(EchoPool()).tokenizer


# --------------------------------------------------------------------------- the Generation, which out_keys lacks


@pytest.mark.parametrize("inplace", [True, False, "empty"])
def test_generation_is_written_although_out_keys_does_not_list_it(tokenizer: Any, inplace: Any) -> None:
    policy = ours(tokenizer, inplace=inplace)
    declared = {"text", "masks", "tokens", "log_probs", "history"}
    assert set(policy.out_keys) == declared
    assert set(policy(question()).keys()) == declared | {"generation"}
    target = TensorDict(batch_size=[1])
    assert policy(question(), tensordict_out=target) is target
    assert set(target.keys()) == declared | {"generation"}


def test_a_second_answer_replaces_the_generation_of_the_first(tokenizer: Any) -> None:
    td = ours(tokenizer)(question())
    ours(tokenizer, generate_kwargs={"max_new_tokens": 2})(td)
    assert td["generation"].completion_tokens.tolist() == [2]
    without = ours(tokenizer, generation_key=None)(td)
    assert without is td
    assert "generation" in td, "a policy without generation_key leaves the entry alone"


def test_a_policy_version_key_is_declared_because_it_is_only_written_when_set(tokenizer: Any) -> None:
    policy = ours(tokenizer, policy_version_key="version")
    assert policy.out_keys == [*ours(tokenizer).out_keys, "version"]
    assert policy(question())["version"].tolist() == [0]
    assert policy.get_new_version(generate=False).out_keys == ours(tokenizer, generate=False).out_keys


def test_selected_out_keys_may_name_the_generation(tokenizer: Any) -> None:
    policy = ours(tokenizer, inplace=False)
    selected = policy.select_out_keys("tokens", "generation")(question())
    assert set(selected.keys()) == {"history", "tokens", "generation"}, "TorchRL keeps in_keys too"
    policy.reset_out_keys()
    policy.select_out_keys("tokens")
    assert set(policy(question()).keys()) == {"history", "tokens"}
    copy = pickle.loads(pickle.dumps(policy))
    assert copy.out_keys == ["tokens"]
    with pytest.raises(ValueError, match="non existent key"):
        policy.select_out_keys("token")


class EndAtOnce(Transform):
    """Ends a conversation after its first answer."""

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        next_tensordict["done"] = torch.ones_like(next_tensordict["done"])
        next_tensordict["terminated"] = next_tensordict["done"].clone()
        next_tensordict["reward"] = torch.ones(*next_tensordict.shape, 1, 1)
        return next_tensordict

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1, 1))
        return reward_spec


def collected(tokenizer: Any, policy: SGLangWrapper) -> TensorDictBase:
    questions = DataLoader([{"query": query} for query in "abcd"], batch_size=2)
    env = ChatEnv.from_dataloader(questions, batch_size=(2,), tokenizer=tokenizer).append_transform(EndAtOnce())
    collector = Collector(env, policy, frames_per_batch=2, total_frames=2)
    (batch,) = collector
    collector.shutdown()
    return batch


def test_a_collector_yields_the_generation_of_a_policy_that_writes_in_place(tokenizer: Any) -> None:
    batch = collected(tokenizer, ours(tokenizer))
    assert batch["generation"].completion_tokens.tolist() == [[3], [3]]


@pytest.mark.parametrize("inplace", [False, "empty"])
def test_a_collector_that_copies_out_keys_yields_the_generation_when_it_is_declared(
    tokenizer: Any, inplace: Any
) -> None:
    policy = ours(tokenizer, inplace=inplace, policy_version_key="version")
    batch = collected(tokenizer, policy)
    assert "generation" not in batch
    assert batch["version"].tolist() == [[0], [0]]
    policy.out_keys = [*policy.out_keys, "generation"]
    for declaring in (policy, pickle.loads(pickle.dumps(policy))):
        assert collected(tokenizer, declaring)["generation"].completion_tokens.tolist() == [[3], [3]]
