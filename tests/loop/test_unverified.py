"""A model that was converted after loading computes something else than the server: found, explained, and healed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, SyncConfig, WeightUpdateError
from torchrl_sglang.server import SGLangServer


def test_a_rounded_rotary_table_fails_the_verification_and_an_exact_one_heals_the_server(
    pristine_server: SGLangServer, tiny_llama: Path
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    exact = rounded.model.rotary_emb.inv_freq.clone()
    rounded.model.rotary_emb.inv_freq = exact.bfloat16().float()  # all that .bfloat16().float() leaves rounded for good
    with AsyncSGLang.connect(pristine_server.url) as servers:
        # The tiny model's table is short: for SmolLM2-135M the same rounding exceeds the default tolerance.
        scheme = SGLangWeightSyncScheme(servers, config=SyncConfig(verify_atol=5e-5))
        with pytest.raises(WeightUpdateError, match="unverified: .*Likely cause: .*inv_freq to bfloat16"):
            servers.update_weights(rounded)
        assert pristine_server.url in servers.pool.quarantined
        report = servers.update_weights(loaded)
        assert report is not None
        assert report.max_logprob_gap is not None
        assert report.max_logprob_gap < 5e-5
        assert servers.pool.quarantined == {}
        scheme.shutdown()
