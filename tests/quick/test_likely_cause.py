"""A failed verification says "unverified", names the likely cause, and the call that heals the server."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import AsyncSGLang, WeightUpdateError
from torchrl_sglang.weights.update.likely_cause import likely_cause, rounded_tables

LLAMA = ("LlamaForCausalLM",)


def cause(model: Any, architecture: str | None = "LlamaForCausalLM", dtype: torch.dtype = torch.float32) -> str:
    return likely_cause(model, architecture, served=LLAMA, served_dtype=dtype)


@pytest.mark.parametrize("convert", ["bfloat16", "half"])
def test_a_model_that_was_converted_after_loading_is_recognised(model: Any, convert: str) -> None:
    converted = getattr(copy.deepcopy(model), convert)()
    dtype = {"bfloat16": "bfloat16", "half": "float16"}[convert]
    assert set(rounded_tables(converted).values()) == {dtype}
    assert rounded_tables(converted.float()), "converting back does not restore what was rounded"
    text = cause(converted, dtype=torch.bfloat16)
    assert "converted after loading (.bfloat16(), .half() or .to(dtype))" in text
    assert f"inv_freq to {dtype}" in text
    assert "from_pretrained(..., dtype=torch.bfloat16)" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_was_loaded_in_its_dtype_is_not(tiny_llama: Path, dtype: torch.dtype) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    assert rounded_tables(loaded) == {}
    assert "converted" not in cause(loaded, dtype=dtype)


def test_a_table_of_few_or_round_values_is_not_taken_for_a_rounded_one() -> None:
    module = nn.Module()
    module.register_buffer("inv_freq", torch.tensor([1.0, 0.5]))
    module.register_buffer("other", torch.ones(64))
    assert rounded_tables(module) == {}


def test_another_architecture_comes_first(model: Any) -> None:
    text = cause(copy.deepcopy(model).bfloat16(), "MistralForCausalLM")
    assert text == "Likely cause: the trainer's model is a MistralForCausalLM, the servers hold LlamaForCausalLM."


def test_two_dtypes_are_named(tiny_llama: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    assert "the trainer computes in bfloat16 and the servers in float32" in cause(loaded)


def test_without_a_model_or_a_visible_cause_there_is_a_question(model: Any) -> None:
    assert cause(None).startswith("The servers should answer alike")
    assert "compute what the served checkpoint's architecture does" in cause(model)


def test_the_error_says_unverified_and_how_to_heal_and_nothing_is_generated_meanwhile(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).bfloat16().float()
    with FakeServer(FakeSettings(model_path=tiny_llama)) as fake, AsyncSGLang.connect(fake.url) as servers:
        with pytest.raises(WeightUpdateError) as caught:  # the fake server's answers are no transformer's
            servers.update_weights(model)
        message = str(caught.value)
        assert message.startswith("the weights were sent, but are unverified: ")
        assert "differs from the trainer by" in message
        assert "Likely cause: the trainer's model was converted after loading" in message
        assert f"Now {fake.url} generates nothing until it is verified" in message
        assert "servers.update_weights(model) sends all weights again and verifies them" in message
        assert "half-updated" not in message
        assert fake.url in servers.pool.quarantined
    with FakeServer(FakeSettings(model_path=tiny_llama, weight_version="dirty-1@a")) as fake:
        servers = AsyncSGLang.connect(fake.url)
        assert "half-updated or unverified weights (dirty-1@a)" in servers.pool.quarantined[fake.url]
        assert "servers.update_weights(model) heals it" in servers.pool.quarantined[fake.url]
