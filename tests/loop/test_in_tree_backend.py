"""TorchRL's own SGLang backend (0.14.1) with SGLang 0.5.23, and this package on the same server.

These tests check the statements in the documentation about the in-tree backend. If a TorchRL release changes that
backend, a test here fails and the statement must be revised. Slow, because they test another project's code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
import torch

from tests.loop.sync_cases import PROMPTS, assert_serves, load, make_collector
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme

backends = pytest.importorskip("torchrl.modules.llm.backends.sglang")
sglang_nccl = pytest.importorskip("torchrl.weight_update.llm.sglang_nccl")

pytestmark = pytest.mark.slow


def test_a_collector_accepts_this_packages_scheme_and_not_the_in_tree_one(
    url: str, tiny_llama: Path, tiny_llama_b: Path
) -> None:
    with pytest.raises(NotImplementedError):
        make_collector(url, tiny_llama, sglang_nccl.SGLangWeightSyncScheme(url))
    collector = make_collector(url, tiny_llama, SGLangWeightSyncScheme(url))
    try:
        model = load(tiny_llama_b)
        collector.update_policy_weights_(model)
        assert_serves(url, model, version=1)
    finally:
        collector.shutdown()


def test_the_in_tree_transport_requests_a_removed_endpoint_and_leaves_the_server_paused(
    url: str, tiny_llama_b: Path
) -> None:
    """These are the first two steps of each of its updates; the third needs NCCL."""
    transport = sglang_nccl.SGLangWeightSyncScheme(url).create_transport()
    assert requests.get(f"{url}/get_load", timeout=10).status_code == 404
    with pytest.raises(RuntimeError, match="load query while pausing generation.*Not Found"):
        transport._pause_generation_for_update("model")
    assert requests.get(f"{url}/ready", timeout=10).status_code == 503
    with AsyncSGLang.connect(url) as engine:
        model = load(tiny_llama_b)
        engine.update_weights(model)
    assert requests.get(f"{url}/ready", timeout=10).status_code == 200
    assert_serves(url, model, version=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_in_tree_group_needs_a_gpu_and_this_packages_does_not(
    url: str, tiny_llama_b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
        monkeypatch.delenv(name, raising=False)  # the in-tree backend sets them; restored after the test
    model = load(tiny_llama_b)
    transport = sglang_nccl.SGLangWeightSyncScheme(url).create_transport()
    with pytest.raises((RuntimeError, AssertionError, AttributeError), match="(?i)cuda|nvidia"):
        transport.init_all_workers_group(sglang_nccl.get_model_metadata(model))
    with AsyncSGLang.connect(url) as engine:
        engine.init_weight_update_group()
        engine.update_weights(model)
    assert_serves(url, model, version=1)


def test_the_in_tree_engine_has_no_model_metadata_and_cannot_update_weights(url: str, tiny_llama_b: Path) -> None:
    model = load(tiny_llama_b)
    in_tree = backends.AsyncSGLang.connect(url)
    assert in_tree.get_model_metadata() == {}
    with pytest.raises(RuntimeError, match="not initialized"):
        in_tree.update_weights(iter(model.state_dict().items()))
    # The body it would announce one tensor with; SGLang requires names, dtypes and shapes.
    request = {"name": "model.norm.weight", "dtype": "float32", "shape": [64]}
    answer = requests.post(f"{url}/update_weights_from_distributed", json=request, timeout=10)
    assert answer.status_code >= 400
    with AsyncSGLang.connect(url) as engine:
        assert engine.get_model_metadata()["model.norm.weight"] == (torch.float32, torch.Size([64]))
        engine.update_weights(iter(model.state_dict().items()))
        assert engine.generate(input_ids=PROMPTS[0], max_new_tokens=1)
    assert_serves(url, model, version=1)
