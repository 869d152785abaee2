"""``engine.init_weight_update_group``: a group where one is needed, and what it says where none is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import AsyncSGLang, ConfigError, SGLangWeightSyncScheme, SyncConfig

JOIN = "/init_weights_update_group"


@pytest.fixture
def near(tiny_llama: Path) -> Iterator[FakeServer]:
    with FakeServer(FakeSettings(model_path=tiny_llama, is_found=True)) as server:
        yield server


def joined(server: FakeServer) -> list[str]:
    return [event["body"]["master_address"] for event in server.events if event["path"] == JOIN]


def test_it_says_that_a_server_which_shares_memory_needs_no_group(near: FakeServer) -> None:
    with AsyncSGLang.connect(near.url) as engine:
        (choice,) = engine.init_weight_update_group("127.0.0.1").values()
        assert (choice.transport, choice.reason) == ("ipc", "it shares this host's memory")
    assert joined(near) == []


def test_the_broadcast_transport_makes_a_group_with_a_server_on_this_host_too(near: FakeServer) -> None:
    with AsyncSGLang.connect(near.url) as engine:
        scheme = SGLangWeightSyncScheme(engine, config=SyncConfig(transport="broadcast", master_address="127.0.0.1"))
        choices = engine.init_weight_update_group()
        assert choices[near.url].transport == "broadcast"
        scheme.shutdown()
    assert joined(near) == ["127.0.0.1"]


@pytest.mark.parametrize("transport", ["ipc", "http"])
def test_an_address_for_a_transport_without_a_group_is_refused(near: FakeServer, transport: str) -> None:
    with AsyncSGLang.connect(near.url) as engine:
        scheme = SGLangWeightSyncScheme(engine, config=SyncConfig(transport=transport))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="makes no process group: leave out master_address, master_port"):
            engine.init_weight_update_group("127.0.0.1", 29500)
        assert engine.init_weight_update_group()[near.url].transport == transport
        scheme.shutdown()
