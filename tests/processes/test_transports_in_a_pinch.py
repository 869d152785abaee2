"""Weight transports in a forked child, and in a process that has no file descriptors left."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServerProcess, FakeSettings
from torchrl_sglang.weights.shared_memory.same_host import check_same_host


@pytest.fixture
def server(tiny_llama: Path) -> Iterator[FakeServerProcess]:
    with ExitStack() as stack:
        yield stack.enter_context(FakeServerProcess(FakeSettings(model_path=tiny_llama, is_found=True)))


@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
def test_a_forked_child_that_pushes_is_another_trainer(
    server: FakeServerProcess, tiny_llama: Path, transport: str
) -> None:
    program = Path(__file__).with_name("forked_trainer.py")
    done = subprocess.run(
        [sys.executable, str(program), server.url, transport, str(tiny_llama)],
        env={**os.environ, "PYTHONPATH": str(program.parents[2]), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.strip().endswith("all pushes succeeded"), done.stderr


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
    server: FakeServerProcess, spare: int
) -> None:
    assert check_same_host(server.url).is_shared
    with descriptors(spare):
        check = check_same_host(server.url)
    assert check.is_shared or check.may_change, check.reason
    assert "another host" not in check.reason
    assert check_same_host(server.url).is_shared
