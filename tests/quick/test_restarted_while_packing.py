"""A server that is restarted while weights are packed does not get a part of them only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeServer
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool


def test_a_partial_push_is_refused(
    make: Callable[..., FakeServer], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make()
    pool = SGLangPool([SGLangClient(server.url)])
    pool.connect()
    sync = WeightSync(pool, SyncConfig(verify="off", transport="http"))
    trained = {name: tensor + 1 for name, tensor in read_checkpoint(tiny_llama).items()}
    sync.push(trained)
    transport: Any = sync._transport
    stage = transport.stage

    def slow(*arguments: Any) -> None:
        stage(*arguments)
        pool.state.restarted(server.url, "default")  # by the crash monitor

    monkeypatch.setattr(transport, "stage", slow)
    name = next(iter(trained))
    num_events = len(server.events)
    with pytest.raises(WeightUpdateError, match="was restarted while the weights were packed") as caught:
        sync.push({name: trained[name]}, partial=True)
    assert caught.value.server_weights == {server.url: "old"}
    assert not {"/pause_generation", "/update_weights_from_tensor"} & {
        event["path"] for event in server.events[num_events:]
    }
    assert sync.push(trained) is not None, "all weights are right for a new process"
    sync.close()
