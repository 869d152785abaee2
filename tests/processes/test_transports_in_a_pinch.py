"""Weight transports in a forked child, and in a process that has no file descriptors left."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_sglang import FakeServerProcess, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.shared_memory.same_host import check_same_host


@pytest.fixture
def server(tiny_llama: Path) -> Iterator[FakeServerProcess]:
    with ExitStack() as stack:
        yield stack.enter_context(FakeServerProcess(FakeSettings(model_path=tiny_llama, is_found=True)))


@pytest.fixture
def tensors(tiny_llama: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(tiny_llama)


def in_child(action: Callable[[], Any]) -> None:
    """Run in a forked child; it must end by itself, and without an error."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            action()
        except BaseException as error:  # noqa: BLE001  it must not return into the test run
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
def test_a_forked_child_that_pushes_is_another_trainer(
    server: FakeServerProcess, tensors: dict[str, torch.Tensor], transport: Any
) -> None:
    client = SGLangClient(server.url)
    sync = WeightSync(SGLangPool([client]), SyncConfig(transport=transport, verify="full"))
    sync.push(tensors)
    owner = sync.owner

    def push() -> None:
        sync.push({name: tensor + 1 for name, tensor in tensors.items()})
        sync.close()

    in_child(push)
    held = WeightVersion.parse(client.weight_version())
    assert not held.dirty
    assert held.owner != owner
    assert sync.push({name: tensor + 2 for name, tensor in tensors.items()}) is not None  # verified
    in_child(sync.close)  # leaves the parent's groups alone
    assert sync.push({name: tensor + 3 for name, tensor in tensors.items()}) is not None
    sync.close()


def open_descriptors() -> list[int]:
    return [int(path.name) for path in Path("/proc/self/fd").iterdir()]


@contextmanager
def descriptors(spare: int) -> Iterator[None]:
    """This process can open ``spare`` files more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(open_descriptors())
    filler = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest - len(open_descriptors()) + 2)]  # fills all gaps
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(filler) + 1 + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in filler:
            os.close(each)


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_a_process_without_descriptors_does_not_take_a_server_for_one_on_another_host(
    server: FakeServerProcess, tmp_path: Path, spare: int
) -> None:
    assert check_same_host(server.url, tmp_path).is_shared
    with descriptors(spare):
        check = check_same_host(server.url, tmp_path)
    assert check.is_shared or check.may_change, check.reason
    assert "another host" not in check.reason
    assert check_same_host(server.url, tmp_path).is_shared
