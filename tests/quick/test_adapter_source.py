"""The adapter that is sent computes what PEFT's layers compute, in SGLang's form; or it is refused by name."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from torchrl_sglang.errors import ConfigError, WeightCoverageError
from torchrl_sglang.protocol.messages import ServerInfo
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.source.adapter import AdapterSource
from torchrl_sglang.weights.source.adapter_features import FIELDS
from torchrl_sglang.weights.transports.lora_limits import require_fitting_servers, require_lora

peft = pytest.importorskip("peft")

LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
STACKS = [("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))]
SERVED: dict[str, dict[str, Any]] = {
    "v alone": {"target_modules": ["v_proj"]},
    "k alone": {"target_modules": ["k_proj"]},
    "q and k": {"target_modules": ["q_proj", "k_proj"]},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "up alone": {"target_modules": ["up_proj"]},
    "gate alone": {"target_modules": ["gate_proj"]},
    "o and down": {"target_modules": ["o_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "an expression": {"target_modules": r".*layers\.1\..*(q|v|up)_proj"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*(q|gate)_proj"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 7, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "patterns and rslora": {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 9}, "use_rslora": True},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
    "bias of a model without": {"target_modules": ["q_proj"], "bias": "all"},
    "alpha 0": {"target_modules": ["q_proj"], "lora_alpha": 0},
}
REFUSED: dict[str, dict[str, Any]] = {
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "modules_to_save=": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "use_dora": {"target_modules": ["q_proj"], "use_dora": True},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "use_qalora": {"target_modules": ["q_proj"], "use_qalora": True},
    "trainable_token_indices": {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
    "alora_invocation_tokens": {"target_modules": ["q_proj"], "alora_invocation_tokens": [72]},
    "layer_replication": {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (1, 2)]},
    "target_parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
    "lm_head": {"target_modules": ["lm_head"]},
    "embed_tokens": {"target_modules": ["embed_tokens", "q_proj"]},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "pissa_niter_4": {"target_modules": ["v_proj"], "init_lora_weights": "pissa_niter_4"},
    "olora": {"target_modules": ["down_proj"], "init_lora_weights": "olora"},
}


def adapted(folder: Path, *configs: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A PEFT model with an adapter per configuration, all of them in effect, with values that matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **configs[0]}), adapter_name="first")
    for number, config in enumerate(configs[1:]):
        model.add_adapter(f"adapter{number}", peft.LoraConfig(**{**LORA, **config}))
    model.base_model.set_adapter(list(model.peft_config))
    randomise(model)
    return model.eval()


def randomise(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(std=0.2)


def changes(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight, by the module's path from ``layers`` on."""
    found: dict[str, torch.Tensor] = {}
    for path, layer in model.named_modules():
        for name in layer.active_adapters if hasattr(layer, "lora_A") else ():
            if name in layer.lora_A:
                key = path[path.index("layers.") :]
                found[key] = found.get(key, 0) + layer.get_delta_weight(name)
    return found


def sent_changes(source: AdapterSource) -> dict[str, torch.Tensor]:
    """What SGLang computes from what is sent: alpha / r for all, B times A, every tensor of rank r."""
    tensors, config = dict(source.tensors()), source.peft_config
    assert tensors.keys() == source.specs().keys()
    assert config["use_rslora"] is False
    assert len({tensor.dtype for tensor in tensors.values()}) == 1
    found = {}
    for name, a_RI in tensors.items():
        if name.endswith("lora_A.weight"):
            b_OR = tensors[name.replace("lora_A", "lora_B")]
            assert len(a_RI) == b_OR.shape[1] == config["r"]
            path = name[name.index("layers.") :].removesuffix(".lora_A.weight")
            assert path.rpartition(".")[2] in config["target_modules"]
            found[path] = config["lora_alpha"] / config["r"] * (b_OR.float() @ a_RI.float())
    return found


def assert_sends_what_peft_adds(model: Any, folder: Path) -> AdapterSource:
    source = AdapterSource(model, Checkpoint.read(folder), torch.float32)
    sent, expected = sent_changes(source), changes(model)
    for path, change in sent.items():
        wanted = expected.pop(path, torch.zeros_like(change))
        torch.testing.assert_close(change, wanted.float(), rtol=1e-5, atol=1e-6)
    assert not expected, "not sent"
    for path in list(sent):  # SGLang's stacked buffers must be filled completely
        for parent, members in STACKS:
            layer, _, name = path.partition(f".{parent}.")
            if name in members:
                assert {f"{layer}.{parent}.{member}" for member in members} <= sent.keys()
    return source


@pytest.mark.parametrize("config", SERVED.values(), ids=SERVED)
def test_what_is_sent_is_what_peft_adds(tiny_llama: Path, config: dict[str, Any]) -> None:
    assert_sends_what_peft_adds(adapted(tiny_llama, config), tiny_llama)


@pytest.mark.parametrize(("feature", "config"), REFUSED.items())
def test_what_sglang_does_not_compute_is_refused_by_name(
    tiny_llama: Path, feature: str, config: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=feature):
        AdapterSource(adapted(tiny_llama, config), Checkpoint.read(tiny_llama))


def test_every_field_of_pefts_configuration_is_known() -> None:
    """A new PEFT with a new feature: say in FIELDS whether SGLang can compute it."""
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= FIELDS.keys()


def test_a_field_of_a_newer_peft_is_refused_unless_it_has_its_default(tiny_llama: Path) -> None:
    newer = dataclasses.make_dataclass("LoraConfig", [("use_next", bool, False)], bases=(peft.LoraConfig,))
    model, checkpoint = adapted(tiny_llama, {"target_modules": ["q_proj"]}), Checkpoint.read(tiny_llama)
    model.peft_config["first"] = newer(target_modules=["q_proj"])
    AdapterSource(model, checkpoint)
    model.peft_config["first"] = newer(target_modules=["q_proj"], use_next=True)
    with pytest.raises(ConfigError, match="use_next"):
        AdapterSource(model, checkpoint)


def test_biases_that_are_trained_are_refused(make_model: Any) -> None:
    folder = make_model(arch="qwen2")  # its attention has biases
    for bias in ("all", "lora_only"):
        model = adapted(folder, {"target_modules": ["q_proj"], "bias": bias})
        with pytest.raises(ConfigError, match="bias"):
            AdapterSource(model, Checkpoint.read(folder))
    assert_sends_what_peft_adds(adapted(folder, {"target_modules": ["q_proj"]}), folder)


def test_adapters_in_effect_together_are_sent_as_their_sum(tiny_llama: Path) -> None:
    first = {"target_modules": ["q_proj", "down_proj"]}
    second = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5, "use_rslora": True}
    source = assert_sends_what_peft_adds(adapted(tiny_llama, first, second), tiny_llama)
    assert source.peft_config["r"] == 7


def test_only_adapters_in_effect_count(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.read(tiny_llama)
    dora = {"target_modules": ["v_proj"], "use_dora": True}
    model = adapted(tiny_llama, {"target_modules": ["q_proj"]}, dora)
    model.set_adapter("first")
    assert set(sent_changes(AdapterSource(model, checkpoint))) == {
        f"layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkv"
    }
    expected = changes(model)["layers.1.self_attn.q_proj"]
    model.merge_adapter(["first"])
    sent = sent_changes(AdapterSource(model, checkpoint))["layers.1.self_attn.q_proj"]
    torch.testing.assert_close(sent, expected)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ConfigError, match="no adapter is in effect"):
        AdapterSource(model, checkpoint)
    model.base_model.enable_adapter_layers()
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["first"] = math.nan
    with pytest.raises(ConfigError, match="scale nan"):
        AdapterSource(model, checkpoint)


def test_adapters_that_are_not_lora_are_refused(tiny_llama: Path) -> None:
    for config in (peft.IA3Config(task_type="CAUSAL_LM"), peft.LoHaConfig(target_modules=["q_proj"])):
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), config)
        with pytest.raises(ConfigError, match=str(config.peft_type.value)):
            AdapterSource(model, Checkpoint.read(tiny_llama))


def test_a_trained_parameter_outside_the_adapter_is_refused(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, {"target_modules": ["q_proj"]})
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        AdapterSource(model, Checkpoint.read(tiny_llama))


def test_another_base_model_is_refused(tiny_llama: Path, tiny_llama_b: Path, make_model: Any) -> None:
    checkpoint = Checkpoint.read(tiny_llama)
    with pytest.raises(ConfigError, match="is not the one in the servers' checkpoint"):
        AdapterSource(adapted(tiny_llama_b, {"target_modules": ["q_proj"]}), checkpoint)
    merged = adapted(tiny_llama, {"target_modules": ["q_proj"]}).merge_and_unload()
    again = peft.get_peft_model(merged, peft.LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ConfigError, match="merge_and_unload"):
        AdapterSource(again, checkpoint)
    for sizes in ({"hidden": 128}, {"layers": 3}, {"kv_heads": 4}):
        with pytest.raises(ConfigError, match="the servers'"):
            AdapterSource(adapted(make_model(**sizes), {"target_modules": "all-linear"}), checkpoint)
    rounded = adapted(tiny_llama, {"target_modules": ["q_proj"]}, dtype=torch.bfloat16)
    AdapterSource(rounded, checkpoint, torch.bfloat16)


def test_a_resized_embedding_is_refused(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, {"target_modules": ["q_proj"]})
    model.base_model.model.resize_token_embeddings(330, mean_resizing=False)
    with pytest.raises(ConfigError, match="resize_token_embeddings"):
        AdapterSource(model, Checkpoint.read(tiny_llama))


def test_an_initialisation_that_changes_the_base_is_refused_where_it_cannot_be_compared(tiny_llama: Path) -> None:
    specs = Checkpoint.from_specs(Checkpoint.read(tiny_llama).specs.values())
    model = adapted(tiny_llama, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"})
    with pytest.raises(ConfigError, match="init_lora_weights='pissa'"):
        AdapterSource(model, specs)
    AdapterSource(adapted(tiny_llama, {"target_modules": ["q_proj"]}), specs)


def test_a_saved_adapter_is_sent_as_the_one_that_was_trained(tiny_llama: Path, tmp_path: Path) -> None:
    trained = adapted(tiny_llama, SERVED["patterns"])
    trained.save_pretrained(tmp_path, selected_adapters=["first"])
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "first")
    checkpoint = Checkpoint.read(tiny_llama)
    ours, theirs = (dict(AdapterSource(model, checkpoint).tensors()) for model in (trained, loaded))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_no_hub_is_asked(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama, SERVED["all-linear"])
    model.peft_config["first"].base_model_name_or_path = "somebody/a-model"

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    AdapterSource(model, Checkpoint.read(tiny_llama)).check_values()


def test_half_precision_stays_unless_scales_must_be_multiplied_in(tiny_llama: Path) -> None:
    def dtype_of(config: dict[str, Any]) -> torch.dtype:
        model = adapted(tiny_llama, config, dtype=torch.bfloat16).to(torch.bfloat16)  # PEFT makes adapters float32
        source = AdapterSource(model, Checkpoint.read(tiny_llama), torch.bfloat16)
        (dtype,) = {spec.dtype for spec in source.specs().values()}
        return dtype

    assert dtype_of(SERVED["q and v"]) == torch.bfloat16
    assert dtype_of(SERVED["patterns"]) == torch.float32


def test_values_that_no_server_should_get_are_named(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, SERVED["v alone"])
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    layer.lora_B["first"].weight.data[3, 1] = math.inf
    with pytest.raises(WeightCoverageError, match=r"layers\.1\.self_attn\.v_proj\.lora_B"):
        AdapterSource(model, Checkpoint.read(tiny_llama)).check_values()


def test_experts_are_refused_and_attention_beside_them_is_not(make_model: Any) -> None:
    folder = make_model(arch="qwen3_moe")
    assert_sends_what_peft_adds(adapted(folder, {"target_modules": ["q_proj", "o_proj"]}), folder)
    with pytest.raises(ConfigError, match="target_parameters"):
        AdapterSource(adapted(folder, {"target_modules": ["down_proj"]}), Checkpoint.read(folder))
    with pytest.raises(ConfigError, match="gate"):
        AdapterSource(adapted(folder, {"target_modules": r".*mlp\.gate"}), Checkpoint.read(folder))


def test_a_model_whose_modules_sglang_does_not_adapt_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="c_attn"):
        AdapterSource(adapted(tmp_path, {"target_modules": ["c_attn"]}), Checkpoint.read(tmp_path))


def info(**raw: Any) -> ServerInfo:
    known = {name: raw.pop(name) for name in ("device", "dp_size", "lora_enabled") if name in raw}
    defaults = {"url": "http://s", "version": "0", "model_path": "m", "tokenizer_path": "m", "lora_enabled": True}
    return ServerInfo(**{**defaults, **known}, raw=raw)


def test_an_adapter_beyond_a_servers_flags_is_refused(tmp_path: Path) -> None:
    config = {"r": 4, "target_modules": ["k_proj", "q_proj", "v_proj"]}
    fits = info(max_lora_rank=4, lora_target_modules=["v_proj"])
    require_fitting_servers(config, [fits, info(max_lora_rank=8, lora_target_modules=["all"]), info()])
    with pytest.raises(ConfigError, match="--max-lora-rank 3"):
        require_fitting_servers(config, [fits, info(max_lora_rank=3, lora_target_modules=["all"])])
    with pytest.raises(ConfigError, match="--lora-target-modules o_proj"):
        require_fitting_servers(config, [info(max_lora_rank=4, lora_target_modules=["o_proj"])])
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "target_modules": ["model.o_proj"]}')
    started_with = {"lora_paths": [{"lora_name": "x", "lora_path": str(tmp_path)}]}
    with pytest.raises(ConfigError, match="--max-lora-rank 2"):
        require_fitting_servers(config, [info(**started_with)])
    with pytest.raises(ConfigError, match="o_proj"):
        require_fitting_servers({**config, "r": 2}, [info(**started_with)])


def test_a_server_that_cannot_use_adapters_is_refused() -> None:
    require_lora(info())
    with pytest.raises(ConfigError, match="--enable-lora"):
        require_lora(info(lora_enabled=False))
    with pytest.raises(ConfigError, match="--dp-size"):
        require_lora(info(dp_size=2))
    targets = {"lora_target_modules": ["q_proj", "up_proj"]}
    require_lora(info(device="cuda", **targets), has_experts=True)
    with pytest.raises(ConfigError, match="experts"):
        require_lora(info(device="cpu", **targets), has_experts=True)
