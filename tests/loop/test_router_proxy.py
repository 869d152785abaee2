"""The real router admits its servers where the environment has a proxy."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.fake_sglang import FakeSettings
from tests.loop.forked_processes import ProcessFactory
from torchrl_sglang import RouterConfig, SamplingParams
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.pool import RouterClient, SGLangPool
from torchrl_sglang.server import SGLangRouter

NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_router_behind_a_proxy_admits_its_servers(
    name: str, processes: ProcessFactory, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("sglang_router") is None:
        assert not os.environ.get("CI"), "sglang-router is not installed: make env"
        pytest.skip("sglang-router is not installed")
    fake = processes.start_server(FakeSettings(model_path=tiny_llama))
    monkeypatch.setenv(name, NOBODY)
    router = SGLangRouter(RouterConfig(policy="round_robin"))
    router.start()
    pool = SGLangPool([SGLangClient(fake.url, ClientConfig())], router=RouterClient(router.url, ClientConfig()))
    try:
        pool.connect()
        reply = pool.generate([[3, 7]], SamplingParams(max_new_tokens=2, temperature=0))[0]
        assert reply.server == router.url
    finally:
        pool.close()
        router.stop()
