"""Transports ``ipc``, ``http`` and ``auto`` on fake servers: what they send, and what stays in shared memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
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

from tests.fake_sglang import FakeServer, FakeServerProcess, FakeSettings, Fault
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import (
    AsyncSGLang,
    ConfigError,
    SGLangWeightSyncScheme,
    SyncConfig,
    WeightCoverageError,
    WeightSync,
    WeightUpdateError,
)
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import StorageError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.shared_memory.same_host import check_same_host
from torchrl_sglang.weights.shared_memory.segments import SegmentPool, remove_abandoned_segments

TENSORS = "/update_weights_from_tensor"
BUCKETS = "/update_weights_from_distributed"
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def make(tiny_llama: Path) -> Iterator[Callable[..., FakeServer]]:
    with ExitStack() as servers:

        def start(**settings: Any) -> FakeServer:
            settings = {"is_found": True, "model_path": tiny_llama, **settings}
            return servers.enter_context(FakeServer(FakeSettings(**settings)))

        yield start


@pytest.fixture
def tensors(tiny_llama_b: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(tiny_llama_b)


def config_of(transport: Any, **settings: Any) -> SyncConfig:
    return SyncConfig(**{"transport": transport, "bucket_bytes": 60_000, "verify": "full", **settings})


def sync_of(*servers: FakeServer, config: SyncConfig) -> WeightSync:
    return WeightSync(SGLangPool([SGLangClient(server.url) for server in servers]), config)


def count(server: FakeServer, path: str) -> int:
    return sum(event["path"] == path for event in server.events)


def own_segments(pid: int | None = None) -> list[str]:
    return [path.name for path in SHARED_MEMORY.glob(f"torchrl-*-*-*-{pid or os.getpid()}.*")]


def holds(server: FakeServer, tensors: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(rank[name], tensor) for rank in server.weights for name, tensor in tensors.items())


# ------------------------------------------------------------------------------------------------------- one transport


@pytest.mark.parametrize("transport", ["ipc", "http"])
@pytest.mark.parametrize("stage", ["off", "always"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_rank_of_every_server_holds_what_was_sent(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor], transport: str, stage: Any, tp_size: int
) -> None:
    servers = [make(tp_size=tp_size, api_key="k"), make(tp_size=tp_size, api_key="k")]
    from torchrl_sglang import ClientConfig

    clients = [SGLangClient(server.url, ClientConfig(api_key="k")) for server in servers]
    sync = WeightSync(SGLangPool(clients), config_of(transport, stage=stage))
    for _ in range(3):
        tensors = {name: tensor + 0.5 for name, tensor in tensors.items()}
        report = sync.push(tensors)
        assert report is not None
        assert (report.transport, report.is_staged) == (transport, stage == "always")
        assert all(holds(server, tensors) for server in servers)
    assert all(count(server, TENSORS) == 3 * report.num_buckets for server in servers)
    assert all(count(server, "/init_weights_update_group") == 0 for server in servers)
    sync.close()


def test_segments_are_reused_bounded_and_gone_after_close(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    sync = sync_of(make(), config=config_of("ipc", stage="off", verify="off"))
    sizes = []
    for _ in range(20):
        sync.push(tensors)
        sizes.append({name: (SHARED_MEMORY / name).stat().st_size for name in own_segments()})
    assert all(size == sizes[1] for size in sizes[1:])
    assert len(sizes[-1]) == 2
    assert sum(sizes[-1].values()) <= 2 * max(60_000, *(tensor.nbytes for tensor in tensors.values())) + 2 * 4096
    sync.close()
    assert own_segments() == []


def test_a_model_that_grows_and_a_change_from_staged_to_not_leave_no_segment_behind(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    pool = SegmentPool()
    from torchrl_sglang.weights.buckets.layout import plan_buckets
    from torchrl_sglang.weights.buckets.packing import BucketPacker
    from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec

    packer = BucketPacker("cpu", allocate=pool.make, discard=pool.discard)
    specs = [TensorSpec.of(name, tensor) for name, tensor in tensors.items()]

    def pack(bucket_bytes: int, *, is_staged: bool) -> int:
        packer.is_staged = is_staged
        plan = plan_buckets(specs, bucket_bytes=bucket_bytes)
        for _ in packer.packed(plan, lambda names: [(name, tensors[name]) for name in names]):
            pass
        return len(plan)

    def settle(number: int) -> bool:
        end = time.monotonic() + 10
        while len(own_segments()) != number and time.monotonic() < end:
            time.sleep(0.01)
        return len(own_segments()) == number

    assert settle(0)
    pack(60_000, is_staged=False)
    assert settle(2)
    assert settle(pack(60_000, is_staged=True))
    assert settle(pack(100_000, is_staged=True))
    pack(200_000, is_staged=False)
    assert settle(2)
    pool.close()
    assert own_segments() == []


def test_nan_is_refused_before_a_server_is_paused_and_named(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    server = make()
    for stage in ("off", "always"):
        sync = sync_of(server, config=config_of("ipc", stage=stage, verify="off"))
        bad = {name: tensor.clone() for name, tensor in tensors.items()}
        bad["lm_head.weight"][3, 2] = float("nan")
        bad["model.norm.weight"][0] = float("inf")
        with pytest.raises(WeightCoverageError) as caught:
            sync.push(bad)
        assert "2 tensors hold" in str(caught.value)
        assert "lm_head.weight: 1 of" in str(caught.value)
        assert count(server, "/pause_generation") == 0
        sync.close()


def test_a_bare_iterator_is_checked_as_a_whole_before_a_server_is_paused_if_it_is_staged(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    server = make()
    sync = sync_of(server, config=config_of("ipc", stage="always"))
    some = dict(list(tensors.items())[:-1])
    with pytest.raises(WeightCoverageError):
        sync.push(iter(some.items()))
    assert count(server, "/pause_generation") == 0
    report = sync.push(iter(tensors.items()))
    assert report is not None
    assert holds(server, tensors)
    sync.close()


def test_a_server_that_fails_drops_out_and_the_others_have_the_new_weights(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    good, bad = make(), make()
    sync = sync_of(good, bad, config=config_of("ipc"))
    sync.push(tensors)
    bad.arm(Fault(path=TENSORS, action="refuse", nth=2))
    newer = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(WeightUpdateError, match=f"{bad.url} failed while receiving weights") as caught:
        sync.push(newer)
    assert caught.value.server_weights == {good.url: "new", bad.url: "mixed"}
    assert holds(good, newer)
    assert own_segments() == []
    assert sync.push(newer) is not None
    assert holds(bad, newer)
    sync.close()


def test_a_full_shared_memory_is_an_error_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    pool = SegmentPool()
    with pytest.raises(StorageError, match=r"/dev/shm has no room for 1 MB.*--shm-size"):
        pool.make(10**6)
    assert own_segments() == []
    pool.close()


# ------------------------------------------------------------------------------------------------------ the host check


def test_a_server_that_does_not_show_its_scheduler_is_not_given_memory(
    tiny_llama: Path, tensors: dict[str, torch.Tensor]
) -> None:
    server = FakeServerProcess(FakeSettings(model_path=tiny_llama)).start()  # threads of this process have been named
    try:
        sync = WeightSync(SGLangPool([SGLangClient(server.url)]), config_of("ipc"))
        with pytest.raises(ConfigError, match=r"has no SGLang scheduler below it: a tunnel or proxy"):
            sync.push(tensors)
        assert not [event for event in server.events if event["path"] == "/pause_generation"]
    finally:
        server.kill()


def test_a_forwarded_port_is_not_taken_for_the_server_behind_it(make: Callable[..., FakeServer]) -> None:
    """The tunnel is a process of its own; the server is this process, whose scheduler would be found."""
    server = make()
    port = int(server.url.rsplit(":", 1)[1])
    code = f"""
import socket, threading
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
def pump(a, b):
    while data := a.recv(65536):
        b.sendall(data)
while True:
    near, _ = listener.accept()
    far = socket.create_connection(("127.0.0.1", {port}))
    for pair in ((near, far), (far, near)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""
    tunnel = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert tunnel.stdout is not None
        url = f"http://127.0.0.1:{int(tunnel.stdout.readline())}"
        assert SGLangClient(url).connect().model_path
        check = check_same_host(url)
        assert not check.is_shared
        assert f"({tunnel.pid}) answers at its address and has no SGLang scheduler" in check.reason
        assert check_same_host(server.url).is_shared
    finally:
        tunnel.kill()
        tunnel.wait()


def test_a_server_whose_shared_memory_is_another_is_not_given_memory(
    make: Callable[..., FakeServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a container: the token is written where the server does not look."""
    from torchrl_sglang.weights.shared_memory import same_host

    monkeypatch.setattr(same_host, "SHARED_MEMORY", tmp_path)
    original = Path.read_bytes

    def in_container(path: Path) -> bytes:
        if str(path).startswith("/proc/") and str(tmp_path) in str(path):
            raise FileNotFoundError(2, "No such file or directory")
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", in_container)
    check = check_same_host(make().url)
    assert not check.is_shared
    assert f"has another {tmp_path}: it, or this process, runs in a container" in check.reason


def test_another_users_scheduler_is_not_given_memory(
    make: Callable[..., FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    check = check_same_host(make().url)
    assert check.is_shared == (real == 0)  # root opens everybody's files


def test_an_address_of_another_host_and_a_closed_port_are_not_this_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        check = check_same_host(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert not check.is_shared  # nothing accepts the connection
        port = listener.getsockname()[1]
    closed = check_same_host(f"http://127.0.0.1:{port}")
    assert "no connection" in closed.reason


def test_a_server_that_listens_on_ipv6_is_found(make: Callable[..., FakeServer]) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        accepted: list[socket.socket] = []
        thread = threading.Thread(target=lambda: accepted.append(listener.accept()[0]))
        thread.start()
        make()  # gives this process a scheduler
        check = check_same_host(f"http://[::1]:{listener.getsockname()[1]}")
        thread.join(10)
        assert check.is_shared


# ------------------------------------------------------------------------------------------------------ auto and mixed


def test_a_mixed_fleet_gets_its_weights_by_both_transports_in_one_update(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    near, far, farther = make(), make(is_found=False), make(is_found=False)
    near_url = near.url
    sync = sync_of(near, far, farther, config=config_of("auto"))
    # All fakes share this process, in which a scheduler is found: tell them apart as two hosts would be.
    only_near(sync, near_url)
    for _ in range(3):
        tensors = {name: tensor + 1 for name, tensor in tensors.items()}
        report = sync.push(tensors)
        assert report is not None
        assert report.transport == "ipc+broadcast"
        assert all(holds(server, tensors) for server in (near, far, farther))
    assert [count(near, TENSORS), count(near, BUCKETS)] == [3 * report.num_buckets, 0]
    assert [count(far, TENSORS), count(far, BUCKETS)] == [0, 3 * report.num_buckets]
    sync.close()
    assert own_segments() == []


@pytest.mark.parametrize("failing", ["near", "far"])
@pytest.mark.parametrize("stage", ["off", "always"])
def test_in_a_mixed_fleet_a_failure_of_one_transport_leaves_the_others_servers_new(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor], failing: str, stage: Any
) -> None:
    servers = {"near": make(), "far": make(is_found=False)}
    sync = sync_of(*servers.values(), config=config_of("auto", stage=stage))
    only_near(sync, servers["near"].url)
    path = TENSORS if failing == "near" else BUCKETS
    servers[failing].arm(Fault(path=path, action="refuse", nth=3))
    with pytest.raises(WeightUpdateError, match=servers[failing].url) as caught:
        sync.push(tensors)
    other = "far" if failing == "near" else "near"
    assert caught.value.server_weights == {servers[failing].url: "mixed", servers[other].url: "new"}
    assert holds(servers[other], tensors)
    assert sync.push(tensors) is not None
    assert all(holds(server, tensors) for server in servers.values())
    sync.close()


def only_near(sync: WeightSync, near_url: str) -> None:
    from torchrl_sglang.weights.shared_memory.same_host import HostCheck
    from torchrl_sglang.weights.transports.auto import AutoTransport

    sync.reach()
    transport = sync._choose_transport()
    assert isinstance(transport, AutoTransport)
    checks = transport._checks
    original = checks.check

    def check(clients: Any) -> Any:
        return {
            url: found if url == near_url else HostCheck(reason="another host")
            for url, found in original(clients).items()
        }

    checks.check = check  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------------- the helper process


class Trainer:
    """A forked process that makes three segments, says that a process is about to open the first, and waits."""

    def __init__(self, opener: int | None = None) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                pool = SegmentPool()
                datas = [pool.make(100_000) for _ in range(3)]
                segment = pool.of(datas[0])
                if opener is not None:
                    pool.expect(segment, [opener])
                assert pool._process is not None
                os.write(writing, f"{segment.manager} {segment.name} {pool._process.pid}\n".encode())
                signal.pause()
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading) as answer:  # noqa: PTH123  a descriptor
            self.manager, self.name, helper = answer.readline().split()
        self.helper = int(helper)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def await_gone(pid: int, timeout_s: float) -> list[str]:
    end = time.monotonic() + timeout_s
    while own_segments(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return own_segments(pid)


def test_a_trainer_that_is_killed_leaves_no_segment() -> None:
    process = Trainer()
    assert len(own_segments(process.pid)) == 3
    process.kill()
    assert await_gone(process.pid, 10) == []


def test_a_segment_that_a_server_is_about_to_open_outlives_a_killed_trainer_until_it_has_been_read() -> None:
    """A server that was told to open a file that is gone ends."""
    process = Trainer(opener=os.getpid())
    process.kill()
    end = time.monotonic() + 10
    while len(own_segments(process.pid)) > 1 and time.monotonic() < end:
        time.sleep(0.02)
    assert own_segments(process.pid) == [process.name]
    manager, name = process.manager.encode(), f"/{process.name}".encode()
    storage = rebuild_storage_filename(torch.UntypedStorage, manager, name, 100_000)
    storage.fill_(1)
    time.sleep(0.5)
    assert own_segments(process.pid) == [process.name]
    del storage
    assert await_gone(process.pid, 10) == []
    end = time.monotonic() + 10
    while Path(process.manager).exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not Path(process.manager).parent.exists()


def test_a_process_that_ends_before_it_opens_a_segment_is_not_waited_for() -> None:
    opener = os.fork()
    if opener == 0:
        signal.pause()
        os._exit(0)
    process = Trainer(opener=opener)
    process.kill()
    time.sleep(0.5)
    assert own_segments(process.pid) == [process.name]
    os.kill(opener, signal.SIGKILL)
    os.waitpid(opener, 0)
    assert await_gone(process.pid, 10) == []


def test_an_engine_that_is_shut_down_frees_the_memory_of_a_scheme_that_still_lives(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    before = own_segments()
    with AsyncSGLang.connect(make().url) as engine:
        scheme = SGLangWeightSyncScheme(engine, config=config_of("ipc"))
        scheme.sync.push(tensors)
        assert len(own_segments()) > len(before)
    assert own_segments() == before
    scheme.shutdown()


def test_segments_of_a_trainer_that_was_killed_together_with_its_helper_are_removed_by_the_next() -> None:
    process = Trainer()
    assert len(own_segments(process.pid)) == 3
    os.kill(process.helper, signal.SIGKILL)
    process.kill()
    end = time.monotonic() + 10
    while Path(f"/proc/{process.helper}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    foreign = SHARED_MEMORY / f"torchrl-ffffffff-{process.helper}-1-{process.pid}0.0"  # of another process namespace
    foreign.write_bytes(b"")
    try:
        remove_abandoned_segments()
        assert own_segments(process.pid) == []
        assert foreign.exists()
    finally:
        foreign.unlink()


def test_a_helper_that_was_ended_by_somebody_is_replaced_with_the_next_sync(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor]
) -> None:
    sync = sync_of(make(), config=config_of("ipc"))
    sync.push(tensors)
    transport: Any = sync._choose_transport()
    transport._segments._process.kill()
    transport._segments._process.wait()
    assert sync.push(tensors) is not None
    sync.close()
    assert own_segments() == []


def test_a_forked_child_that_ends_leaves_its_parents_segments_alone() -> None:
    pool = SegmentPool()
    pool.make(1000)
    pid = os.fork()
    if pid == 0:
        pool.close()
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(0.3)
    assert len(own_segments()) == 1
    pool.close()
    assert own_segments() == []


def test_auto_falls_back_to_a_broadcast_where_two_buckets_do_not_fit_into_shared_memory(
    make: Callable[..., FakeServer], tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container has 64 MB of it by default."""
    from torchrl_sglang.weights.transports import ipc

    monkeypatch.setattr(ipc, "available_bytes", lambda folders: 99_000)
    server = make()
    sync = sync_of(server, config=config_of("auto", stage="off"))
    report = sync.push(tensors)
    assert report is not None
    assert report.transport == "broadcast"
    (choice,) = sync.transport_choices.values()
    assert choice.reason == "/dev/shm has room for 0.1 MB, and two buckets need 0.2 MB"
    assert holds(server, tensors)
    sync.close()


def test_a_server_whose_ranks_are_on_several_hosts_is_not_given_memory(make: Callable[..., FakeServer]) -> None:
    from dataclasses import replace

    from torchrl_sglang.weights.transports.ipc import HostChecks

    pool = SGLangPool([SGLangClient(make().url)])
    pool.connect()
    (client,) = pool.clients
    client._info = replace(client.info, raw={**client.info.raw, "nnodes": 2})
    (check,) = HostChecks(pool.state).check([client]).values()
    assert check.reason == "its ranks are on several hosts (nnodes=2)"


@pytest.mark.slow
def test_a_server_that_never_gets_the_request_of_a_killed_trainer_is_waited_for_ten_seconds_not_a_minute() -> None:
    process = Trainer(opener=os.getpid())
    process.kill()
    start = time.monotonic()
    assert await_gone(process.pid, 40) == []
    assert time.monotonic() - start > 5
