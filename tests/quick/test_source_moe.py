"""Modules whose tensors are not the checkpoint's: packed experts, renamed parts, models without their head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import nn

from torchrl_sglang.errors import WeightCoverageError
from torchrl_sglang.weights.buckets.layout import plan_buckets
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.checkpoint.coverage import check_coverage
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.source import conversion
from torchrl_sglang.weights.source.factory import open_source


@pytest.fixture(scope="module")
def folder(make_model: Any) -> Path:
    return make_model(arch="qwen3_moe")


@pytest.fixture
def model(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_sends(weights: Any, checkpoint: Checkpoint, stored: dict[str, torch.Tensor]) -> None:
    source = open_source(weights, checkpoint)
    check_coverage(source.specs(), checkpoint)
    source.check_values()
    sent = dict(source.tensors())
    assert sent.keys() == stored.keys() == source.specs().keys()
    for name, tensor in sent.items():
        assert not tensor.requires_grad
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)


def test_packed_experts_become_the_checkpoints_tensors(model: nn.Module, folder: Path) -> None:
    packed = [name for name, _ in model.named_parameters() if name.endswith("experts.gate_up_proj")]
    assert packed, "this transformers doesn't pack experts, so the test checks nothing"
    stored = load_file(folder / "model.safetensors")
    assert any(".experts.0.gate_proj." in name for name in stored)
    assert_sends(model, Checkpoint.read(folder), stored)
    assert_sends(nn.ModuleDict({"model": torch.compile(model)}), Checkpoint.read(folder), stored)


def test_packed_experts_in_a_tensordict_are_converted_by_the_checkpoints_config(model: nn.Module, folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    for weights in (TensorDict.from_module(nn.ModuleDict({"model": model})), model.state_dict()):
        assert_sends(weights, Checkpoint.read(folder), stored)


def test_experts_already_under_checkpoint_names_are_sent_as_they_are(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    assert_sends(stored, Checkpoint.read(folder), stored)


def test_a_checkpoint_that_stores_packed_experts_gets_packed_experts(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, save_original_format=False)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in stored)
    assert_sends(model, Checkpoint.read(tmp_path), stored)


def test_buckets_contain_the_trained_experts(model: nn.Module, folder: Path) -> None:
    checkpoint = Checkpoint.read(folder)
    source = open_source(model, checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    plan = plan_buckets(source.specs().values(), bucket_bytes=20_000)
    assert len(plan) > 3
    received = {}
    for bucket, flat in BucketPacker().packed(plan, source.tensors):
        received.update(zip(bucket.names, (view.clone() for view in bucket.views(flat)), strict=True))
    assert received.keys() == checkpoint.specs.keys()
    gate, up = model.model.layers[1].mlp.experts.gate_up_proj[2].chunk(2)
    assert torch.equal(received["model.layers.1.mlp.experts.2.gate_proj.weight"], gate)
    assert torch.equal(received["model.layers.1.mlp.experts.2.up_proj.weight"], up)
    model.save_pretrained(folder.parent / "moe_trained")
    stored = load_file(folder.parent / "moe_trained" / "model.safetensors")
    assert all(torch.equal(received[name], stored[name]) for name in stored)


def test_only_requested_experts_are_converted_and_frozen_ones_are_not_trainable(model: nn.Module, folder: Path) -> None:
    model.requires_grad_(False)
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(True)
    source = open_source(model, Checkpoint.read(folder))
    trainable = [spec.name for spec in source.specs().values() if spec.trainable]
    assert trainable == [f"model.layers.0.mlp.experts.{i}.down_proj.weight" for i in range(len(trainable))] != []
    sent = list(source.tensors(trainable[1:3]))
    assert [name for name, _ in sent] == trainable[1:3]
    assert torch.equal(sent[1][1], model.model.layers[0].mlp.experts.down_proj[2])


def test_a_surplus_expert_is_refused(model: nn.Module, folder: Path) -> None:
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(torch.cat([experts.down_proj, experts.down_proj[:1]]))
    checkpoint = Checkpoint.read(folder)
    with pytest.raises(WeightCoverageError, match=r"1 unknown"):
        check_coverage(open_source(model, checkpoint).specs(), checkpoint)


def test_a_model_without_its_head_fits_a_tied_checkpoint(make_model: Any) -> None:
    folder = make_model(arch="qwen3", tied=True)
    body = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert "layers.0.mlp.up_proj.weight" in body.state_dict()
    assert_sends(body, Checkpoint.read(folder), load_file(folder / "model.safetensors"))


def test_outputs_of_a_conversion_are_grouped_by_their_sources() -> None:
    """Also if the conversion joins tensors, as some models' do."""
    traced = {name: conversion._Traced.make((4, 2), torch.float32, frozenset({name})) for name in "abcd"}
    joined = torch.cat([traced["a"], traced["b"]])
    first, second = (traced["c"] * 2).chunk(2)
    groups = conversion._grouped(traced, {"ab": joined, "c0": first, "c1": second, "renamed": traced["d"]})
    assert {group.sources: (set(group.outputs), group.renames) for group in groups} == {
        ("a", "b"): ({"ab"}, False),
        ("c",): ({"c0", "c1"}, False),
        ("d",): ({"renamed"}, True),
    }
    assert groups[0].outputs["ab"] == ((8, 2), torch.float32)
    assert groups[1].outputs["c0"] == ((2, 2), torch.float32)


def test_parts_with_other_names_on_disk_are_renamed_as_in_saving(tmp_path: Path) -> None:
    """A vision model: ``model.language_model.layers...`` in the module, ``language_model.model.layers...`` on disk."""
    text = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, **sizes).to_dict(),
        text_config=transformers.LlamaConfig(**text, **sizes).to_dict(),
        image_token_index=5,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not any(name in stored for name in model.state_dict() if ".layers." in name)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    wrapped = nn.ModuleDict({"model": model})
    for weights in (model, loaded, wrapped, TensorDict.from_module(wrapped), model.state_dict()):
        assert_sends(weights, Checkpoint.read(tmp_path), stored)
