"""Fake servers and trainers as processes, forked in 50 ms each from a process that has imported everything.

::

    with ProcessFactory(folder) as processes:
        server = processes.start_server(FakeSettings(model_path=...))
        trainer = processes.start_trainer([server.url], weights_folder, SyncConfig())
        trainer.kill()

The children end with the factory, even if it is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import ClientConfig, ServerTimeoutError, SGLangError, SyncConfig, WeightSync, WeightSyncError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_begin_update, build_pause, build_set_version, build_update_bucket
from torchrl_sglang.protocol.dialect import SERVER_INFO
from torchrl_sglang.weights.group.process_group import WeightGroup
from torchrl_sglang.weights.group.rendezvous import group_name

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120.0
_PR_SET_PDEATHSIG = 1


class Forked:
    """One child process: its id, and the file that it writes its report to."""

    def __init__(self, pid: int, report: Path) -> None:
        self.pid = pid
        self._report = report

    def read(self, timeout_s: float = START_TIMEOUT_S) -> Any:
        """Wait for the child's report and return it."""
        wait_until(lambda: self._report.exists() or not self.is_running, f"{self.pid} wrote no report", timeout_s)
        assert self._report.exists(), f"process {self.pid} ended without a report; its output is on stderr"
        return json.loads(self._report.read_text())

    def suspend(self) -> None:
        """Send SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not self.is_running, f"process {self.pid} survived SIGKILL", 10)

    @property
    def is_running(self) -> bool:
        return Path(f"/proc/{self.pid}").exists()


class ForkedServer(Forked):
    """A fake server. A second one can replace it at the port in ``url``, with the same ``settings``."""

    def __init__(self, pid: int, report: Path, settings: FakeSettings) -> None:
        super().__init__(pid, report)
        self.url: str = self.read()
        self.settings = settings

    def arm(self, *faults: Fault) -> None:
        self._admin("POST", "faults", [fault.to_json() for fault in faults])

    def disarm(self) -> None:
        self._admin("DELETE", "faults")

    def set_state(self, **state: Any) -> None:
        self._admin("POST", "state", state)

    def requests(self, path: str, *, answered: bool = False) -> int:
        """Number of requests to ``path`` that have arrived (or been answered)."""
        events = self._admin("GET", "events")
        return sum(event["path"] == path and (not answered or event["status"] is not None) for event in events)

    def _admin(self, method: str, what: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/fake/{what}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=20.0) as reply:
            return json.load(reply)


class ProcessFactory:
    """Starts the process that children are forked from, and forks them; thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._count = 0
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ProcessFactory:
        command = [sys.executable, "-m", "tests.loop.forked_processes"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def start_server(self, settings: FakeSettings) -> ForkedServer:
        pid, report = self._fork("serve", asdict(settings) | {"model_path": str(settings.model_path)})
        return ForkedServer(pid, report, settings)

    def start_trainer(self, urls: list[str], weights: Path, client: ClientConfig, sync: SyncConfig) -> Forked:
        """A trainer that pushes a folder's tensors once; reports the version, or the error and the servers' states."""
        settings = {"urls": urls, "weights": str(weights), "client": asdict(client), "sync": asdict(sync)}
        return Forked(*self._fork("train", settings))

    def start_stalled_trainer(self, url: str, weights: Path, *, inside_a_broadcast: bool) -> Forked:
        """A trainer that reports in the middle of its push and then waits forever.

        Args:
            url: the server.
            weights: folder of tensors.
            inside_a_broadcast: whether it stops after it has announced a bucket, for whose bytes the server waits;
                otherwise it stops between buckets, when half of the tensors have arrived.
        """
        return Forked(*self._fork("announce" if inside_a_broadcast else "stall", {"url": url, "weights": str(weights)}))

    def start_function(self, function: str, settings: dict[str, Any]) -> Forked:
        """A process that calls ``module:name`` with ``settings`` and its way to report."""
        return Forked(*self._fork("call", {"function": function, "settings": settings}))

    def start_sharded_trainer(self, world_size: int, url: str, model: Path) -> list[Forked]:
        """An FSDP2 trainer of ``world_size`` processes; see :func:`_shard`."""
        folder = self._folder / f"shards{self._count}"
        folder.mkdir()
        shared = {"world_size": world_size, "url": url, "model": str(model), "folder": str(folder)}
        return [Forked(*self._fork("shard", {**shared, "rank": rank})) for rank in range(world_size)]

    def _fork(self, what: str, settings: dict[str, Any]) -> tuple[int, Path]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._count += 1
            report = self._folder / f"{what}{self._count}.json"
            self._process.stdin.write(json.dumps({"do": what, "report": str(report), "settings": settings}) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline()), report


def wait_until(condition: Callable[[], object], complaint: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{complaint} within {timeout_s} s"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------- inside the children


def _serve(settings: dict[str, Any], report: Callable[[Any], None]) -> None:
    report(FakeServer(FakeSettings(**settings | {"faults": ()}), exit_on_death=True).start().url)
    threading.Event().wait()


def _train(settings: dict[str, Any], report: Callable[[Any], None]) -> None:
    clients = [SGLangClient(url, ClientConfig(**settings["client"])) for url in settings["urls"]]
    sync = WeightSync(SGLangPool(clients), SyncConfig(**settings["sync"]))
    try:
        done = sync.push(read_checkpoint(settings["weights"]))
        report({"version": done and done.version})
    except WeightSyncError as error:
        report({"error": str(error), "states": error.server_weights})
    except SGLangError as error:
        report({"error": str(error)})


def _stall(settings: dict[str, Any], report: Callable[[Any], None]) -> None:
    def half() -> Iterator[tuple[str, torch.Tensor]]:
        tensors = list(read_checkpoint(settings["weights"]).items())
        yield from tensors[: len(tensors) // 2]
        report("half of the tensors sent")
        threading.Event().wait()

    config = SyncConfig(bucket_bytes=10_000, stage="off")
    WeightSync(SGLangPool([SGLangClient(settings["url"])]), config).push(half())


def _announce(settings: dict[str, Any], report: Callable[[Any], None]) -> None:
    """Sends a trainer's requests one by one: group, pause, dirty version, begin, one bucket that is never broadcast."""
    client = SGLangClient(settings["url"])
    group = WeightGroup.form([client], SyncConfig(), group_name("somebody"))
    for request in (build_pause("abort"), build_set_version("dirty-1@somebody"), build_begin_update()):
        client.send(request)
    name, tensor = next(iter(read_checkpoint(settings["weights"]).items()))
    bucket = build_update_bucket(names=[name], dtypes=["float32"], shapes=[list(tensor.shape)], group=group.name)
    threading.Thread(target=client.send, args=(bucket,), daemon=True).start()
    with contextlib.suppress(ServerTimeoutError):  # the time-out shows that the scheduler waits in the broadcast
        while True:
            client.send(SERVER_INFO, timeout_s=1)
    report("announced")
    threading.Event().wait()


def _shard(settings: dict[str, Any], report: Callable[[Any], None]) -> None:
    """Two optimiser steps with a push after each; rank 0 saves the full model as it was sent last.

    Reports the pushed versions, the size of the default process group (which must still work), and the model's file.
    """
    folder, rank, world_size = Path(settings["folder"]), settings["rank"], settings["world_size"]
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    mesh = init_device_mesh("cpu", (world_size,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.arange(3, 35)[None]
    sync = WeightSync(SGLangPool([SGLangClient(settings["url"])]), SyncConfig(bucket_bytes=50_000))
    versions = []
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        done = sync.push(model)
        versions.append(done and done.version)
    sync.close()
    count = torch.ones(1)
    dist.all_reduce(count)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(whole, folder / "whole.pt")
    report({"versions": versions, "default_group": count.item(), "model": str(folder / "whole.pt")})


def _call(settings: dict[str, Any], report: Callable[[Any], None]) -> None:
    module, name = settings["function"].split(":")
    getattr(importlib.import_module(module), name)(settings["settings"], report)


def _child(order: dict[str, Any], parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)

    def report(value: Any) -> None:
        path = Path(order["report"])
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(value))
        unfinished.rename(path)

    tasks = {"serve": _serve, "train": _train, "stall": _stall, "announce": _announce, "shard": _shard, "call": _call}
    tasks[order["do"]](order["settings"], report)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children that have ended leave no zombies
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    factory_pid = os.getpid()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                _child(json.loads(line), factory_pid)
            except BaseException:  # noqa: BLE001  printed; the child must not continue in the parent's loop
                traceback.print_exc()
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
