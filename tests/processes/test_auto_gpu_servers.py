"""Where transport ``auto`` packs for servers with GPUs. No GPU is needed: the servers only say that they have one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_sglang import FakeServer, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.shared_memory.same_host import HostCheck
from torchrl_sglang.weights.transports import ipc
from torchrl_sglang.weights.transports.auto import AutoTransport


@pytest.fixture
def pool(tiny_llama: Path) -> Iterator[SGLangPool]:
    with ExitStack() as stack:
        settings = FakeSettings(model_path=tiny_llama, is_found=True)
        servers = [stack.enter_context(FakeServer(settings)) for _ in range(2)]
        made = SGLangPool([SGLangClient(server.url) for server in servers])
        made.connect()
        yield made
        made.close()


def sync_and_auto(pool: SGLangPool, backend: Any) -> tuple[WeightSync, AutoTransport]:
    config = SyncConfig(transport="auto", backend=backend, verify="off", bucket_bytes=60_000)
    sync = WeightSync(pool, config)
    made = sync._choose_transport()
    assert isinstance(made, AutoTransport)
    return sync, made


def says_it_has(device: str, clients: Sequence[SGLangClient]) -> None:
    for client in clients:
        client._info = replace(client.info, device=device)


def put_elsewhere(auto: AutoTransport, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = auto._checks.check

    def with_one_elsewhere(clients: Sequence[SGLangClient]) -> dict[str, HostCheck]:
        return check(clients) | ({url: HostCheck(reason="another host")} if url in {c.url for c in clients} else {})

    monkeypatch.setattr(auto._checks, "check", with_one_elsewhere)


@pytest.fixture
def every_gpu_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ipc, "can_open_gpu_memory", lambda pid: True)


@pytest.mark.usefixtures("every_gpu_can_be_opened")
def test_what_gloo_broadcasts_too_is_packed_in_main_memory(
    pool: SGLangPool, tiny_llama_b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = pool.clients
    sync, auto = sync_and_auto(pool, "gloo")
    says_it_has("cuda", pool.clients)
    put_elsewhere(auto, far.url, monkeypatch)
    auto.connect([near])
    assert not auto.packer.is_in_main_memory, "a server alone that sees the GPU reads it there"
    auto.connect([near, far])
    assert auto.name == "ipc+broadcast"
    assert auto.packer.is_in_main_memory
    tensors = read_checkpoint(tiny_llama_b)
    report = sync.push(tensors)
    assert report is not None
    assert report.server_weights == {near.url: "new", far.url: "new"}
    auto.connect([near])
    assert not auto.packer.is_in_main_memory
    sync.close()


def test_with_nccl_all_get_the_broadcast(pool: SGLangPool, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = pool.clients
    sync, auto = sync_and_auto(pool, "auto")
    says_it_has("cuda", pool.clients)
    put_elsewhere(auto, far.url, monkeypatch)
    choices = auto._choose(pool.clients)
    assert {choice.transport for choice in choices.values()} == {"broadcast"}
    assert "NCCL" in choices[near.url].reason
    sync.close()


def test_a_far_server_without_a_gpu_takes_none_from_the_near_one(
    pool: SGLangPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = pool.clients
    sync, auto = sync_and_auto(pool, "auto")
    says_it_has("cuda", [near])
    put_elsewhere(auto, far.url, monkeypatch)
    assert {url: choice.transport for url, choice in auto._choose(pool.clients).items()} == {
        near.url: "ipc",
        far.url: "broadcast",
    }
    sync.close()
