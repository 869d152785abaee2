"""The helper process of the ``ipc`` transport is lost in the middle of a sync: a launched server lives on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.loop.sync_cases import assert_serves, load
from torchrl_sglang import SGLangClient, SGLangPool, SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.server import SGLangServer


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_server_that_may_be_reading_a_segment_lives_on_and_takes_the_next_sync(
    pristine_server: SGLangServer, tiny_llama: Path, tiny_llama_b: Path, number: signal.Signals
) -> None:
    model_a, model_b = load(tiny_llama), load(tiny_llama_b)
    url, process = pristine_server.url, pristine_server.pid
    config = SyncConfig(transport="ipc", bucket_bytes=20_000, stage="off", check_values=False)
    with closing(WeightSync(SGLangPool([SGLangClient(url)]), config)) as sync:
        sync.push(model_a)
        transport: Any = sync._choose_transport()
        tensors = list(model_b.state_dict().items())

        def losing_the_helper() -> Iterator[tuple[str, torch.Tensor]]:
            for index, pair in enumerate(tensors):
                if index == len(tensors) // 2:
                    os.kill(transport._segments._process.pid, number)
                yield pair

        with pytest.raises(WeightUpdateError, match="shared memory|failed while receiving") as caught:
            sync.push(losing_the_helper())
        assert caught.value.server_weights == {url: "mixed"}
        report = sync.push(model_b)
        assert report is not None
        assert_serves(url, model_b, version=report.version)
    assert pristine_server.pid == process
    assert not list(Path("/dev/shm").glob(f"torchrl-*-*-*-{os.getpid()}.*"))
