"""How large buckets are, by transport, room and settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from torchrl_sglang import SyncConfig
from torchrl_sglang.weights.transports import staging
from torchrl_sglang.weights.transports.staging import bucket_bytes

MB = 2**20
MODEL = 5000 * MB


def transport(name: str, *, in_main_memory: bool = True, nbytes: int = 0) -> Any:
    return SimpleNamespace(name=name, packer=SimpleNamespace(is_in_main_memory=in_main_memory, nbytes=nbytes))


@pytest.mark.parametrize(
    ("name", "in_main_memory", "expected"),
    [
        ("ipc", True, 512),
        ("broadcast", True, 512),
        ("ipc+broadcast", True, 512),
        ("ipc", False, 64),
        ("broadcast", False, 64),
        ("http", True, 64),
        ("disk", True, 64),
        ("lora", True, 64),
    ],
)
def test_buckets_in_main_memory_are_larger_but_not_those_in_requests(
    monkeypatch: pytest.MonkeyPatch, name: str, in_main_memory: bool, expected: int
) -> None:
    monkeypatch.setattr(staging, "available_bytes", lambda _shared=(): 10**12)
    assert bucket_bytes(SyncConfig(), transport(name, in_main_memory=in_main_memory), MODEL) == expected * MB


@pytest.mark.parametrize("name", ["ipc", "broadcast", "ipc+broadcast"])
def test_they_shrink_with_the_room_but_not_below_the_smallest(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rooms = []
    for room in (1000, 300, 0):
        monkeypatch.setattr(staging, "available_bytes", lambda _shared=(), room=room: room * MB)
        rooms.append(bucket_bytes(SyncConfig(), transport(name), MODEL) // MB)
    assert rooms == [250, 75, 64]
    monkeypatch.setattr(staging, "available_bytes", lambda _shared=(): 0)
    assert bucket_bytes(SyncConfig(), transport(name, nbytes=1000 * MB), MODEL) == 250 * MB, "kept buffers are room"


def test_a_number_given_by_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "available_bytes", lambda _shared=(): 10**12)
    assert bucket_bytes(SyncConfig(bucket_bytes=1000), transport("ipc"), MODEL) == 1000
    assert bucket_bytes(SyncConfig(), transport("ipc"), 10**13) == 1024 * MB, "never more than 1 GiB"
