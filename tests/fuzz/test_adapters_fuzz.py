"""Random adapters against a real server: each is served as PEFT computes it or refused, and the server stays alive."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.loop.adapter_cases import MAX_RANK, adapted, lora_flags, worst_gap
from torchrl_sglang import ConfigError, SGLangClient, SGLangPool, SyncConfig, WeightSync
from torchrl_sglang.server import SGLangServer

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ODD: tuple[dict[str, Any], ...] = (
    {"use_dora": True},
    {"lora_bias": True},
    {"modules_to_save": ["input_layernorm"]},
    {"modules_to_save": ["lm_head"]},
    {"init_lora_weights": "olora"},
    {"trainable_token_indices": [5]},
    {"layer_replication": [(0, 2), (1, 2)]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["embed_tokens"]},
    {"r": MAX_RANK + 1},
)


def draw(chance: random.Random) -> tuple[list[dict[str, Any]], bool]:
    """Configurations of one to two adapters, and whether a feature that SGLang lacks is among them."""
    configs = [_draw_one(chance) for _ in range(1 if chance.random() < 0.8 else 2)]
    is_odd = chance.random() < 0.25
    if is_odd:
        configs[0] = {**configs[0], **chance.choice(ODD)}
    return configs, is_odd


def _draw_one(chance: random.Random) -> dict[str, Any]:
    names = chance.sample(MODULES, chance.randint(1, len(MODULES)))
    expression = rf".*layers\.{chance.randint(0, 1)}\..*({'|'.join(names)})"
    config: dict[str, Any] = {
        "target_modules": expression if chance.random() < 0.3 else names,
        "r": chance.randint(1, 8),
        "lora_alpha": chance.choice((1, 3, 8, 32)),
        "use_rslora": chance.random() < 0.3,
    }
    if chance.random() < 0.4:
        config["rank_pattern"] = {chance.choice(names): chance.randint(1, 8)}
    if chance.random() < 0.4:
        config["alpha_pattern"] = {chance.choice(names): chance.choice((1, 5, 16))}
    if chance.random() < 0.2 and isinstance(config["target_modules"], list):
        config["layers_to_transform"] = [chance.randint(0, 1)]
    return config


def run(server: SGLangServer, folder: Path, seeds: range) -> None:
    pool = SGLangPool([SGLangClient(server.url)])
    sync = WeightSync(pool, SyncConfig(transport="lora", verify_atol=1e9))  # the gap is compared here
    served = 0
    for seed in seeds:
        configs, is_odd = draw(random.Random(seed))
        try:
            gap = worst_gap(pool, sync, adapted(folder, configs, seed=seed))
        except ConfigError:
            assert is_odd, f"seed {seed}: {configs} was refused"
            continue
        assert not is_odd, f"seed {seed}: {configs} was accepted"
        assert gap < 1e-3, f"seed {seed}: {configs} is {gap} away"  # large scales, so large activations
        served += 1
        assert server.is_running, f"seed {seed}: {configs} ended the server"
    assert served > len(seeds) // 2
    sync.close()
    pool.close()


@pytest.fixture
def server(special_server: Callable[..., SGLangServer]) -> SGLangServer:
    return special_server(extra_args=lora_flags("all"))


@pytest.mark.slow
def test_random_adapters_are_served_exactly_or_refused(server: SGLangServer, tiny_llama: Path) -> None:
    run(server, tiny_llama, range(25))


@pytest.mark.slow
def test_many_random_adapters_are_served_exactly_or_refused(server: SGLangServer, tiny_llama: Path) -> None:
    run(server, tiny_llama, range(1000, 1300))
