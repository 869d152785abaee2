"""A real server answers what PEFT computes, for adapters of every kind that is accepted; one server for all cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.loop.adapter_cases import adapted, worst_gap
from torchrl_sglang import ConfigError, SGLangClient, SGLangPool, SyncConfig, WeightSync
from torchrl_sglang.server import SGLangServer

SERVED: dict[str, list[dict[str, Any]]] = {
    "v alone": [{"target_modules": ["v_proj"]}],
    "k alone": [{"target_modules": ["k_proj"]}],
    "q and k": [{"target_modules": ["q_proj", "k_proj"]}],
    "up alone": [{"target_modules": ["up_proj"]}],
    "gate alone": [{"target_modules": ["gate_proj"]}],
    "o and down": [{"target_modules": ["o_proj", "down_proj"]}],
    "all linear layers": [{"target_modules": "all-linear"}],
    "an expression": [{"target_modules": r".*layers\.1\..*(q|v|up)_proj"}],
    "excluded modules": [{"target_modules": "all-linear", "exclude_modules": r".*(q|gate)_proj"}],
    "one layer": [{"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}],
    "rslora": [{"target_modules": ["q_proj", "v_proj"], "use_rslora": True}],
    "rank and alpha patterns": [
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 7, r"layers\.1\.mlp\.down_proj": 2},
            "alpha_pattern": {"q_proj": 3, "down_proj": 11},
        }
    ],
    "the largest rank": [{"target_modules": ["q_proj"], "r": 16}],
    "two at once": [{"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["q_proj", "v_proj"], "r": 3}],
}
REFUSED: dict[str, dict[str, Any]] = {
    "use_dora": {"target_modules": ["q_proj"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "lm_head": {"target_modules": ["lm_head"]},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "--max-lora-rank 16": {"target_modules": ["q_proj"], "r": 17},
}


@pytest.fixture
def pool(flagged_server: SGLangServer) -> SGLangPool:
    made = SGLangPool([SGLangClient(flagged_server.url)])
    made.connect()
    return made


def test_every_accepted_adapter_is_served_as_peft_computes_it(pool: SGLangPool, tiny_llama: Path) -> None:
    sync = WeightSync(pool, SyncConfig(transport="lora", verify_atol=1e-4))
    gaps = {}
    for seed, (name, configs) in enumerate(SERVED.items()):
        gaps[name] = worst_gap(pool, sync, adapted(tiny_llama, configs, seed=seed))
    assert {name: gap for name, gap in gaps.items() if not gap < 1e-4} == {}

    merged = adapted(tiny_llama, SERVED["q and k"], seed=99)
    merged.merge_adapter()
    assert worst_gap(pool, sync, merged) < 1e-4
    sync.close()


def test_a_refused_adapter_is_refused_before_anything_is_sent(pool: SGLangPool, tiny_llama: Path) -> None:
    sync = WeightSync(pool, SyncConfig(transport="lora", verify_atol=1e-4))
    good = adapted(tiny_llama, SERVED["v alone"])
    assert worst_gap(pool, sync, good) < 1e-4
    before = pool.state.weights.adapter
    for name, config in REFUSED.items():
        with pytest.raises(ConfigError, match=name):
            sync.push(adapted(tiny_llama, [config]))
        assert pool.state.weights.adapter == before
    assert worst_gap(pool, sync, good) < 1e-4, "the server must still answer"
    sync.close()


def test_an_adapter_trained_in_bfloat16_is_served_by_a_float32_server(pool: SGLangPool, tiny_llama: Path) -> None:
    """The server computes with the adapter's values; PEFT's own forward pass also rounds activations to bfloat16."""
    model = adapted(tiny_llama, SERVED["rank and alpha patterns"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    same_values = adapted(tiny_llama, SERVED["rank and alpha patterns"])
    same_values.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    sync = WeightSync(pool, SyncConfig(transport="lora", verify="off"))
    assert worst_gap(pool, sync, model, reference=same_values) < 1e-4
    sync.close()


def test_a_saved_adapter_is_served_as_it_was_trained(pool: SGLangPool, tiny_llama: Path, tmp_path: Path) -> None:
    trained = adapted(tiny_llama, SERVED["rank and alpha patterns"], seed=5)
    trained.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(trained.unload(), tmp_path / "a0").eval()
    sync = WeightSync(pool, SyncConfig(transport="lora", verify_atol=1e-4))
    assert worst_gap(pool, sync, loaded) < 1e-4
    sync.close()
