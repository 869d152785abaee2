"""What torchrl's own SGLang backend (0.14.1) does with today's SGLang, and ours on the same server.

Not to point fingers: these are the facts our documentation states, and when torchrl mends one, a test here says so.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
import torch

from tests.loop.sync_cases import PROMPTS, assert_serves, load, make_collector
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme
from torchrl_sglang.server import SGLangServer

backends = pytest.importorskip("torchrl.modules.llm.backends.sglang")
sglang_nccl = pytest.importorskip("torchrl.weight_update.llm.sglang_nccl")


@pytest.fixture
def url(pristine_server: SGLangServer) -> str:
    return pristine_server.url


def test_a_collector_takes_our_scheme_and_not_the_one_in_torchrl(
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


def test_its_transport_asks_for_an_endpoint_that_is_gone_and_leaves_the_server_paused(
    url: str, tiny_llama_b: Path
) -> None:
    """The first two steps of its every update; the third is NCCL."""
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to set")
def test_its_group_needs_a_gpu_and_ours_does_not(url: str, tiny_llama_b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
        monkeypatch.delenv(name, raising=False)  # it sets them for the whole process; undone after the test
    model = load(tiny_llama_b)
    transport = sglang_nccl.SGLangWeightSyncScheme(url).create_transport()
    with pytest.raises((RuntimeError, AssertionError, AttributeError), match="(?i)cuda|nvidia"):
        transport.init_all_workers_group(sglang_nccl.get_model_metadata(model))
    with AsyncSGLang.connect(url) as engine:
        engine.init_weight_update_group()
        engine.update_weights(model)
    assert_serves(url, model, version=1)


def test_its_engine_knows_no_metadata_and_no_update(url: str, tiny_llama_b: Path) -> None:
    model = load(tiny_llama_b)
    theirs = backends.AsyncSGLang.connect(url)
    assert theirs.get_model_metadata() == {}
    with pytest.raises(RuntimeError, match="not initialized"):
        theirs.update_weights(iter(model.state_dict().items()))
    # What it would announce one tensor with: SGLang wants names, dtypes and shapes.
    request = {"name": "model.norm.weight", "dtype": "float32", "shape": [64]}
    answer = requests.post(f"{url}/update_weights_from_distributed", json=request, timeout=10)
    assert answer.status_code >= 400
    with AsyncSGLang.connect(url) as engine:
        assert engine.get_model_metadata()["model.norm.weight"] == (torch.float32, torch.Size([64]))
        engine.update_weights(iter(model.state_dict().items()))
        assert engine.generate(input_ids=PROMPTS[0], max_new_tokens=1)
    assert_serves(url, model, version=1)
