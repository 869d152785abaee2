"""The process that owns the shared memory segments: stopped, killed, slow, unable to start; and what it leaves."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_storage_filename

from tests.fake_sglang import FakeServer, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import ConfigError, SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import StorageError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.shared_memory import segments
from torchrl_sglang.weights.shared_memory.segments import SegmentPool, remove_abandoned_segments

SHARED_MEMORY = Path("/dev/shm")
BUCKET_BYTES = 60_000


@pytest.fixture
def server(tiny_llama: Path) -> Iterator[FakeServer]:
    with ExitStack() as stack:
        yield stack.enter_context(FakeServer(FakeSettings(is_found=True, model_path=tiny_llama)))


@pytest.fixture
def tensors(tiny_llama_b: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(tiny_llama_b)


def sync_of(server: FakeServer, transport: Any, **settings: Any) -> WeightSync:
    config = SyncConfig(**{"transport": transport, "bucket_bytes": BUCKET_BYTES, "verify": "full", **settings})
    return WeightSync(SGLangPool([SGLangClient(server.url)]), config)


def pool_of(sync: WeightSync) -> SegmentPool:
    transport: Any = sync._choose_transport()
    found: SegmentPool = getattr(transport, "_ipc", transport)._segments
    return found


def helper_of(pool: SegmentPool) -> int:
    assert pool._process is not None
    return pool._process.pid


def own_segments() -> list[str]:
    return [path.name for path in SHARED_MEMORY.glob(f"torchrl-*-*-*-{os.getpid()}.*")]


def holds(server: FakeServer, tensors: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(rank[name], tensor) for rank in server.weights for name, tensor in tensors.items())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------- stopped and killed


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_helper_that_does_not_answer_is_replaced_before_a_sync(
    server: FakeServer, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A server that is told to open a segment asks the helper first, and ends without its answer."""
    monkeypatch.setattr(segments, "_ANSWER_TIMEOUT_S", 0.5)
    sync = sync_of(server, "ipc")
    sync.push(tensors)
    pool = pool_of(sync)
    first, folder = helper_of(pool), Path(pool._manager).parent
    os.kill(first, number)
    newer = {name: tensor + 1 for name, tensor in tensors.items()}
    assert sync.push(newer) is not None
    assert holds(server, newer)
    assert helper_of(pool) != first
    assert not is_running(first)
    assert not folder.exists()
    sync.close()
    assert own_segments() == []


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_no_server_is_told_of_a_segment_after_the_helper_was_lost_in_the_middle_of_a_sync(
    server: FakeServer, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(segments, "_ANSWER_TIMEOUT_S", 0.5)
    sync = sync_of(server, "ipc", stage="off", check_values=False)
    sync.push(tensors)
    newer = {name: tensor + 1 for name, tensor in tensors.items()}
    told: list[int] = []

    def requests() -> list[dict[str, Any]]:
        return [event for event in server.events if event["path"] == "/update_weights_from_tensor"]

    def losing_the_helper(before: int = len(requests())) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in newer.items():
            if len(requests()) > before and not told:
                while any(thread.name == f"sglang-{server.url}" for thread in threading.enumerate()):
                    time.sleep(0.01)  # a request is on its way, and the server opens what it is told of
                told.append(len(requests()))
                os.kill(helper_of(pool_of(sync)), number)
            yield name, tensor

    with pytest.raises(WeightUpdateError, match="ended or stopped by somebody") as caught:
        sync.push(losing_the_helper())
    assert caught.value.server_weights == {server.url: "mixed"}
    assert told == [len(requests())]
    assert own_segments() == []
    assert sync.push(newer) is not None
    assert holds(server, newer)
    sync.close()
    assert own_segments() == []


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_server_that_has_a_segment_open_when_the_helper_is_lost_lives_on(
    number: signal.Signals,
) -> None:
    """torch closes a file in a destructor, where an error ends the process."""
    pool = SegmentPool()
    segment = pool.of(pool.make(1000))
    helper = helper_of(pool)
    server = os.fork()
    if server == 0:
        name = f"/{segment.name}".encode()
        storage = rebuild_storage_filename(torch.UntypedStorage, segment.manager.encode(), name, 1000)
        pool._connections = None  # another process than the trainer
        os.kill(helper, number)
        while number == signal.SIGKILL and is_running(helper):
            time.sleep(0.01)
        del storage
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]) == 7
    os.kill(helper, signal.SIGKILL)
    pool.close()
    assert own_segments() == []


# ------------------------------------------------------------------------------------------------ what outlives close()


def test_segments_are_gone_after_close_although_a_forked_child_has_the_helpers_pipe() -> None:
    """As the workers of a data loader, which live on."""
    pool = SegmentPool()
    pool.make(1000)
    helper = helper_of(pool)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        start = time.monotonic()
        pool.close()
        assert own_segments() == []
        assert time.monotonic() - start < segments._END_TIMEOUT_S, "the helper has ended by itself"
        assert not is_running(helper)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_segments_that_nobody_is_about_to_open_are_gone_after_close_although_the_helper_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segments, "_END_TIMEOUT_S", 0.0)
    pool = SegmentPool()
    idle, needed = pool.make(1000), pool.make(1000)
    pool.expect(pool.of(needed), [os.getpid()])
    name, helper = pool.of(needed).name, helper_of(pool)
    del idle
    pool.close()
    assert own_segments() == [name]
    assert is_running(helper), "it waits for the server"
    os.kill(helper, signal.SIGKILL)
    (SHARED_MEMORY / name).unlink()


def test_what_a_killed_helper_leaves_is_removed_by_the_next_one_and_nothing_else() -> None:
    gone, alive = SegmentPool(), SegmentPool()
    folders = [Path(pool.open()).parent for pool in (gone, alive)]
    assert gone._process is not None
    gone._process.kill()
    gone._process.wait()
    half_made = SHARED_MEMORY / f"torchrl-sglang-{os.getpid()}"  # of a helper that is just starting
    half_made.mkdir()
    try:
        remove_abandoned_segments()
        assert [folder.exists() for folder in folders] == [False, True]
        assert half_made.exists()
    finally:
        half_made.rmdir()
    alive.close()
    assert not folders[1].exists()


def test_the_folder_for_temporary_files_does_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch copies the socket's path into 108 bytes without looking, and a server may have another such folder."""
    for folder in ("/nonexistent", str(tmp_path / ("x" * 120))):
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr("tempfile.tempdir", folder)
        pool = SegmentPool()
        assert len(pool.open()) < 60
        pool.close()


# ----------------------------------------------------------------------------------------------------- unable to start


def test_auto_broadcasts_where_the_helper_can_not_be_started_and_shares_memory_as_soon_as_it_can(
    server: FakeServer, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "")  # as in a program that embeds Python
        sync = sync_of(server, "auto")
        report = sync.push(tensors)
        assert report is not None
        assert report.transport == "broadcast"
        assert "did not start" in sync.transport_choices[server.url].reason
        with pytest.raises(ConfigError, match="the process that owns shared memory segments did not start"):
            sync_of(server, "ipc").push(tensors)
    report = sync.push(tensors)
    assert report is not None
    assert report.transport == "ipc"
    sync.close()


# --------------------------------------------------------------------------- /dev/shm has less room than it says it has


def full_after(num_calls: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.posix_fallocate, iter(range(10**9))

    def allocate(descriptor: int, offset: int, nbytes: int) -> None:
        if next(calls) >= num_calls:
            raise OSError(number, os.strerror(number))
        real(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", allocate)


FORMS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "dict": dict,
    "iterator": lambda tensors: iter(tensors.items()),
}


@pytest.mark.parametrize(
    ("form", "stage", "num_calls", "number"),
    [
        ("dict", "off", 0, errno.ENOSPC),
        ("dict", "off", 1, errno.EDQUOT),
        ("dict", "always", 0, errno.EIO),
        ("dict", "always", 3, errno.ENOSPC),
        ("iterator", "off", 1, errno.EFBIG),
        ("iterator", "always", 3, errno.ENOSPC),
    ],
)
def test_auto_broadcasts_what_it_has_packed_where_shared_memory_has_less_room_than_it_says(
    server: FakeServer,
    tensors: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    form: str,
    stage: Any,
    num_calls: int,
    number: int,
) -> None:
    sync = sync_of(server, "auto", stage=stage)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        full_after(num_calls, number, patched)
        report = sync.push(FORMS[form](tensors))
    assert report is not None
    assert (report.transport, report.is_staged) == ("broadcast", stage == "always")
    assert report.num_checksums > 0
    assert holds(server, tensors)
    reason = sync.transport_choices[server.url].reason
    assert f"/dev/shm has no room for 0 MB of weights ({os.strerror(number)}" in reason
    assert reason in caplog.text
    assert own_segments() == []
    newer = {name: tensor + 1 for name, tensor in tensors.items()}
    again = sync.push(FORMS[form](newer))
    assert again is not None
    assert again.transport == "broadcast"
    assert holds(server, newer)
    sync.close()


def test_memory_that_servers_cannot_open_is_no_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer may have to grow in the middle of a sync."""
    pool = SegmentPool(may_lack_room=True)
    full_after(1, errno.ENOSPC, monkeypatch)
    first, second = pool.make(1000), pool.make(1000)
    assert pool.of(first).nbytes == 1000
    with pytest.raises(StorageError, match=r"has no room for 0 MB of weights \(No space left on device"):
        pool.of(second)
    pool.close()


def test_ipc_says_what_is_wrong_where_shared_memory_has_less_room_than_it_says(
    server: FakeServer, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = sync_of(server, "ipc")
    with monkeypatch.context() as patched:
        full_after(1, errno.EDQUOT, patched)
        with pytest.raises(StorageError, match=r"has no room for 0 MB of weights \(Disk quota exceeded.*'broadcast'"):
            sync.push(tensors)
    assert own_segments() == []
    assert "/pause_generation" not in [event["path"] for event in server.events]
    report = sync.push(tensors)
    assert report is not None
    assert holds(server, tensors)
    sync.close()


def test_a_helper_answers_a_connection_that_only_asks_and_keeps_nothing_of_it() -> None:
    pool = SegmentPool()
    manager = pool.open()
    for _ in range(300):
        assert segments._answers(manager)
    folder = Path(f"/proc/{helper_of(pool)}/fd")
    end = time.monotonic() + 10
    while len(list(folder.iterdir())) > 12 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(list(folder.iterdir())) <= 12
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(manager)  # says nothing
        assert segments._answers(manager)
    pool.close()
    assert not Path(manager).exists()
