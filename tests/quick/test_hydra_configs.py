"""Policy and scheme built from YAML share one engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import ConfigError, SGLangWeightSyncScheme, SGLangWrapper
from torchrl_sglang.hydra_configs import register_hydra_configs, shared_engine

YAML = """
defaults:
  - sglang_engine@engine: default
  - sglang_policy@policy: default
  - weight_sync_scheme@weight_sync_schemes.policy: sglang
  - _self_
engine: {url: "%s"}
policy: {engine: "${engine}", input_mode: tokens, generate_kwargs: {max_new_tokens: 4}}
weight_sync_schemes:
  policy: {servers: "${engine}", config: {bucket_bytes: 1000, verify: "off"}}
"""


def test_yaml_builds_policy_and_scheme_around_one_engine(tiny_llama: Path, tmp_path: Path) -> None:
    register_hydra_configs()
    GlobalHydra.instance().clear()
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server:
        (tmp_path / "run.yaml").write_text(YAML % server.url)
        with initialize_config_dir(str(tmp_path), version_base=None):
            config = compose("run", overrides=["policy.generate_kwargs.max_new_tokens=5"])
        policy = instantiate(config.policy)
        schemes = instantiate(config.weight_sync_schemes)

    assert isinstance(policy, SGLangWrapper)
    assert policy.sampling_params.max_new_tokens == 5
    scheme = schemes["policy"]
    assert isinstance(scheme, SGLangWeightSyncScheme)
    assert scheme.config.bucket_bytes == 1000
    assert scheme.pool is policy.pool, "policy and scheme must share their view of the servers"


def test_an_engine_needs_a_url_or_a_model() -> None:
    with pytest.raises(ConfigError, match="either url"):
        shared_engine()
