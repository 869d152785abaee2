"""A launched server's ranks wait for a trainer as long as the trainer said, not for torch's 30 minutes."""

from __future__ import annotations

import socket
import time

import pytest

from torchrl_sglang import SyncConfig
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import RequestRejectedError
from torchrl_sglang.protocol.control import (
    build_begin_update,
    build_end_update,
    build_init_group,
    build_pause,
    build_update_bucket,
)
from torchrl_sglang.protocol.dialect import SERVER_INFO
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.weights.group.process_group import WeightGroup

LIMIT_S = 3
PATIENCE_S = 60.0  # far below 30 minutes, far above what a busy machine adds


def test_a_rank_gives_up_joining_and_receiving_and_its_server_goes_on(pristine_server: SGLangServer) -> None:
    client = SGLangClient(pristine_server.url)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        request = build_init_group(
            address="127.0.0.1",
            port=nobody.getsockname()[1],
            rank_offset=1,
            world_size=2,
            name=f"torchrl-sglang-gone.1.{LIMIT_S}",
            backend="gloo",
        )
        with pytest.raises(RequestRejectedError, match="timed out"):
            client.send(request, timeout_s=PATIENCE_S)
    assert client.send(SERVER_INFO)

    group = WeightGroup.form([client], SyncConfig(), f"torchrl-sglang-gone.2.{LIMIT_S}")
    client.send(build_pause("abort"))
    client.send(build_begin_update())
    bucket = build_update_bucket(names=["model.norm.weight"], dtypes=["float32"], shapes=[[64]], group=group.name)
    start = time.monotonic()
    with pytest.raises(RequestRejectedError, match=f"Timed out waiting {LIMIT_S}000ms"):
        client.send(bucket, timeout_s=PATIENCE_S)  # which is never broadcast
    assert time.monotonic() - start >= LIMIT_S
    assert client.send(SERVER_INFO)
    client.send(build_end_update())
    group.close()
