"""Adapters are merged name by name, exactly as PEFT merges them, and the live model stays unchanged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from torchrl_sglang.errors import ConfigError, WeightCoverageError
from torchrl_sglang.weights.checkpoint.coverage import check_coverage
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.source.factory import open_source

peft = pytest.importorskip("peft")

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 16},
    "rank and alpha patterns": {
        "r": 4,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
    },
    "rslora": {"r": 4, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "biases trained": {"r": 4, "bias": "all"},
    "bias in the adapter": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "o_proj"]},
    "output embedding": {"r": 4, "target_modules": ["lm_head"]},
    "modules to save": {"r": 4, "modules_to_save": ["lm_head", "norm"]},
    "dropout": {"r": 4, "lora_dropout": 0.5},
}


@pytest.fixture(scope="module")
def folder(make_model: Any) -> Path:
    return make_model(arch="qwen2")  # its attention layers have biases


def adapted(folder: Path, dtype: torch.dtype = torch.float32, config_class: str = "LoraConfig", **config: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = {"target_modules": PROJECTIONS, **config}
    torch.manual_seed(0)  # half of an adapter's values are initialised at random
    model = peft.get_peft_model(model, getattr(peft, config_class)(task_type="CAUSAL_LM", **config))
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    """Adapters are initialised to zero, which would hide every mistake."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.add_(noise.to(parameter.dtype))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_sends_what_merging_gives(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.read(folder)
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    before = snapshot(model)
    attributes = {name: repr(vars(module)) for name, module in model.named_modules()}
    source = open_source(model, checkpoint)
    check_coverage(source.specs(), checkpoint)
    source.check_values()
    sent = {name: tensor.clone() for name, tensor in source.tensors()}
    assert sent.keys() == expected.keys()
    for name, tensor in sent.items():
        assert (tuple(tensor.shape), tensor.dtype) == (source.specs()[name].shape, source.specs()[name].dtype)
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    after = model.state_dict(keep_vars=True)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "the live model was changed"
    assert {name: repr(vars(module)) for name, module in model.named_modules()} == attributes
    return sent


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_are_merged_exactly_as_by_peft(folder: Path, config: dict[str, Any]) -> None:
    model = adapted(folder, **config)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    sent = assert_sends_what_merging_gives(model, folder)
    assert any(not torch.equal(sent[name], base[name]) for name in sent), "the adapter changed nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_are_merged_exactly(folder: Path, dtype: torch.dtype) -> None:
    assert_sends_what_merging_gives(adapted(folder, dtype=dtype, r=4), folder)
    assert_sends_what_merging_gives(adapted(folder, dtype=dtype, r=4, use_dora=True), folder)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("LoHaConfig", {"r": 4}),
        ("LoKrConfig", {"r": 4}),
        ("IA3Config", {"feedforward_modules": ["down_proj"]}),
        ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    ],
)
def test_adapters_of_other_kinds_are_merged_exactly(folder: Path, kind: str, config: dict[str, Any]) -> None:
    assert_sends_what_merging_gives(adapted(folder, config_class=kind, **config), folder)


def test_a_model_with_the_merged_weights_computes_what_the_adapted_model_does(folder: Path) -> None:
    model = adapted(folder, r=4, lora_alpha=16).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    plain.load_state_dict(dict(open_source(model, Checkpoint.read(folder)).tensors()))
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_layer_is_trainable_if_its_adapter_is(folder: Path) -> None:
    specs = open_source(adapted(folder, r=4, target_modules=["q_proj"]), Checkpoint.read(folder)).specs()
    trainable = [name for name, spec in specs.items() if spec.trainable]
    assert trainable == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]


def test_wrapped_and_injected_adapters_are_merged(folder: Path) -> None:
    checkpoint = Checkpoint.read(folder)
    model = adapted(folder, r=4)
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    injected = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    injected.add_adapter(peft.LoraConfig(r=4, target_modules=PROJECTIONS))
    randomise(injected)
    for weights in (torch.compile(model), nn.ModuleDict({"model": nn.ModuleDict({"module": model})})):
        sent = dict(open_source(weights, checkpoint).tensors())
        assert sent.keys() == expected.keys()
        assert all(torch.equal(sent[name], expected[name]) for name in expected)
    sent = dict(open_source(injected, checkpoint).tensors())
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], expected[name]) for name in expected)


def test_disabled_merged_and_several_adapters_are_sent_as_the_forward_pass_uses_them(folder: Path) -> None:
    checkpoint = Checkpoint.read(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model = adapted(folder, r=4, modules_to_save=["norm"])
    merged = copy.deepcopy(model).merge_and_unload().state_dict()

    def sent() -> dict[str, torch.Tensor]:
        return dict(open_source(model, checkpoint).tensors())

    with model.disable_adapter():
        assert all(torch.equal(tensor, base[name]) for name, tensor in sent().items())
    model.base_model.merge_adapter()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in sent().items())
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged
    model.base_model.unmerge_adapter()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    randomise(model)
    assert_sends_what_merging_gives(model, folder)
    model.set_adapter("second")
    assert_sends_what_merging_gives(model, folder)


def test_an_adapter_on_packed_experts_is_merged_and_converted(make_model: Any) -> None:
    folder = make_model(arch="qwen3_moe")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(folder, r=2, target_modules=["q_proj"], target_parameters=experts)
    checkpoint = Checkpoint.read(folder)
    expected = dict(open_source(copy.deepcopy(model).merge_and_unload(), checkpoint).tensors())
    before = snapshot(model)
    source = open_source(model, checkpoint)
    check_coverage(source.specs(), checkpoint)
    sent = dict(source.tensors())
    assert all(torch.equal(sent[name], expected[name]) for name in expected)
    assert sent.keys() == expected.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_nan_in_an_adapter_is_reported_under_the_weight_it_is_merged_into(folder: Path) -> None:
    model = adapted(folder, r=4)
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.v_proj.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(WeightCoverageError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight"):
        open_source(model, Checkpoint.read(folder)).check_values()


def test_a_tied_embedding_that_only_one_side_adapts_is_refused(make_model: Any) -> None:
    folder = make_model(arch="llama", tied=True)
    model = adapted(folder, r=4, target_modules=["embed_tokens"])
    with pytest.raises(WeightCoverageError, match="ties lm_head"):
        open_source(model, Checkpoint.read(folder))


def test_adapters_that_cannot_be_merged_are_refused_by_name(folder: Path) -> None:
    checkpoint = Checkpoint.read(folder)
    model = adapted(folder, r=4)
    with pytest.raises(ConfigError, match="pass the PEFT model itself"):
        open_source(model.state_dict(), checkpoint)
    tokens = adapted(folder, r=4, trainable_token_indices={"embed_tokens": [1, 2]})
    with pytest.raises(ConfigError, match="TrainableTokensWrapper can't be merged"):
        open_source(tokens, checkpoint)
    quantised = adapted(folder, r=4)
    layer = quantised.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised"):
        open_source(quantised, checkpoint)
    prompt = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    )
    with pytest.raises(WeightCoverageError, match="unknown"):
        check_coverage(open_source(prompt, checkpoint).specs(), checkpoint)
