"""The checks of the kit: each returns facts for the report, raises AssertionError, or says why it can't run here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stand_ins import ROOT, Receiver, SecondRank, Sync, described, make_tensors

LIMIT_S = 300


class Skip(Exception):
    """A check that can't run here; says why."""


def check_environment(device: str) -> dict[str, Any]:
    """What is installed, and the GPU."""
    facts: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        facts |= {"gpu": gpu.name, "uuid": str(gpu.uuid), "gpus": torch.cuda.device_count()}
        facts |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "free_gb": free / 1e9, "total_gb": total / 1e9}
    return facts


def check_ipc(device: str) -> dict[str, Any]:
    """Two receivers see every byte, staged or not; the memory is the one that the trainer's tensors are on."""
    facts: dict[str, Any] = {}
    for staged in (False, True):
        with Receiver(device) as one, Receiver(device, 1) as two, Sync([one, two], staged=staged) as sync:
            for seed in range(2):
                tensors = make_tensors(device, seed)
                started = time.perf_counter()
                buckets = sync.push(tensors)
                facts[f"seconds, {'staged' if staged else 'not staged'}"] = time.perf_counter() - started
                expected = described(tensors)
                assert one.seen == expected, "the first receiver saw other bytes"
                assert two.seen == expected, "the second receiver saw other bytes"
            kinds = {buffer.device.type for buffer in sync.transport.packer.buffers}
            assert kinds == {device}, f"the buffers are in {kinds}"
            facts["buckets"] = buckets
    return facts


def check_reuse(device: str) -> dict[str, Any]:
    """200 pushes through the same two buffers: no byte is overwritten too early, and no memory grows."""

    def used() -> tuple[int, int]:
        if device == "cuda":
            free, total = torch.cuda.mem_get_info(0)
            return torch.cuda.memory_allocated(0), total - free
        segments = [path for path in Path("/dev/shm").iterdir() if f"-{os.getpid()}." in path.name]
        return len(segments), sum(path.stat().st_size for path in segments if path.exists())

    with Receiver(device) as receiver, Sync([receiver]) as sync:
        model = make_tensors(device)
        names = [f"model.layers.{i}.mlp.{each}_proj.weight" for i in range(3) for each in ("up", "down")]
        tensors = {name: model[name] for name in [*names, "model.step"]}
        marks = []
        for number in range(200):
            tensors["model.step"].fill_(number)
            tensors["model.layers.2.mlp.up_proj.weight"].add_(1)
            assert sync.push(tensors) > 2, "each buffer must be used twice in a push"
            if number % 20 == 0:
                assert receiver.seen == described(tensors), f"other bytes in push {number}"
            if number in (20, 199):
                marks.append(used())
    early, late = marks
    assert late[0] <= early[0], f"the trainer's memory grew from {early[0]} to {late[0]}"
    assert device == "cpu" or late[1] <= early[1] + 32 * 2**20, f"the GPU's memory grew from {early[1]} to {late[1]}"
    return {"after 20": early, "after 200": late}


def check_dead_receiver(device: str) -> dict[str, Any]:
    """One receiver dies with its mappings open: the other gets everything, and so does a third afterwards."""
    tensors = make_tensors(device)
    with Receiver(device) as one, Receiver(device, 1) as two:
        with Sync([one, two]) as sync:
            two.hold = True
            sync.push(tensors)
            with contextlib.suppress(RuntimeError):
                two.ask(do="die")
            tensors["model.step"].fill_(77)
            sync.push(tensors)
            assert list(sync.failed) == [two.url], f"failed: {sync.failed}"
            assert one.seen == described(tensors), "the healthy receiver saw other bytes"
        with Receiver(device, 2) as three, Sync([three]) as again:
            again.push(tensors)
            assert three.seen == described(tensors), "the next receiver saw other bytes"
    return {}


def check_streams(device: str) -> dict[str, Any]:
    """Weights that the GPU still computes when they are packed arrive as they will be, from any stream and thread."""
    if device != "cuda":
        raise Skip("streams are a GPU's")
    side = torch.cuda.Stream()
    with Receiver(device) as receiver, Sync([receiver]) as sync:
        tensors = make_tensors(device)
        sync.push(tensors)  # buffers and handles are there
        name = "model.layers.3.mlp.up_proj.weight"
        torch.cuda._sleep(400_000_000)  # about 0.2 s of this stream's time
        tensors[name].add_(1)
        sync.push(tensors)
        assert receiver.seen == described(tensors), "the default stream's last step is missing"
        with torch.cuda.stream(side):
            side.wait_stream(torch.cuda.default_stream())
            torch.cuda._sleep(400_000_000)
            tensors[name].add_(1)
            sync.push(tensors)
        torch.cuda.synchronize()
        assert receiver.seen == described(tensors), "the side stream's last step is missing"
        torch.cuda._sleep(400_000_000)
        tensors[name].add_(1)
        thread = threading.Thread(target=sync.push, args=(tensors,))
        thread.start()
        thread.join()
        assert receiver.seen == described(tensors), "the step before a push in another thread is missing"
    return {}


def check_devices(device: str) -> dict[str, Any]:
    """Which receivers may open GPU memory: those that see this GPU, however they name it."""
    if device != "cuda":
        raise Skip("there is no GPU to select")
    from torchrl_sglang.weights.shared_memory.gpus import can_open_gpu_memory

    uuid = str(torch.cuda.get_device_properties(0).uuid)
    found: dict[str, Any] = {}
    tensors = make_tensors(device)
    for label, variables in (
        ("unset", {}),
        ("0", {"CUDA_VISIBLE_DEVICES": "0"}),
        ("none", {"CUDA_VISIBLE_DEVICES": ""}),
    ):
        with Receiver(device, environ=variables) as receiver, Sync([receiver]) as sync:
            found[label] = can_open_gpu_memory(receiver.process.pid)
            sync.push(tensors)  # where it may not open the GPU, through main memory
            assert receiver.seen == described(tensors), f"other bytes with CUDA_VISIBLE_DEVICES {label}"
            kinds = {buffer.device.type for buffer in sync.transport.packer.buffers}
            assert kinds == {"cuda" if found[label] else "cpu"}, f"{label}: the buffers are in {kinds}"
    assert found["none"] is False, "a process without GPUs was told to open one"
    return {"uuid": uuid, "may open by CUDA_VISIBLE_DEVICES": found}


def check_group(device: str) -> dict[str, Any]:
    """A weight group with a second rank on the same GPU, where NCCL allows it; over gloo on the CPU."""
    from torchrl_sglang.config import SyncConfig
    from torchrl_sglang.errors import WeightUpdateError
    from torchrl_sglang.weights.group.process_group import WeightGroup

    backend = "nccl" if device == "cuda" else "gloo"
    version = torch.cuda.nccl.version() if device == "cuda" else ()
    may_share = tuple(version) >= (2, 30)
    if may_share:
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"  # this process is a check's own
    tensor = torch.arange(2**20, dtype=torch.int32, device=device).view(torch.uint8)
    if device == "cuda":
        torch.cuda.synchronize()
    rank = SecondRank(device, tensor.nbytes, os.environ)
    config = SyncConfig(backend=backend, master_address="127.0.0.1", group_timeout_s=60)
    facts: dict[str, Any] = {"backend": backend, "nccl": ".".join(map(str, version)), "may share": may_share}
    try:
        group = WeightGroup.form([rank], config, "torchrl-sglang-kit")  # type: ignore[list-item]
        refusal = ""
        try:
            group.broadcast(tensor, timeout_s=60)
        except WeightUpdateError as error:
            refusal = str(error)
        finally:
            group.drop()
        if backend == "nccl" and not may_share:
            assert refusal, "NCCL connected two ranks on one GPU, which its version should refuse"
            assert "uplicate GPU" in refusal, f"another reason than expected: {refusal}"
            return {**facts, "refused": refusal}
        assert not refusal, refusal
        assert rank.process is not None
        received = rank.process.communicate(timeout=60)[0].strip()
        assert received == hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest(), "rank 1 received other bytes"
        return facts
    finally:
        if rank.process is not None:
            rank.process.kill()
            rank.process.wait()


def check_self_test(device: str) -> dict[str, Any]:
    """`torchrl-sglang doctor --self-test`, where SGLang and TorchRL are installed."""
    python = os.environ.get("KIT_SGLANG_PYTHON") or sys.executable
    probe = subprocess.run([python, "-c", "import sglang, torchrl"], capture_output=True, text=True)
    if probe.returncode:
        raise Skip(f"SGLang or TorchRL is missing ({probe.stderr.strip().splitlines()[-1]}): --sglang PYTHON")
    command = [python, "-m", "torchrl_sglang", "doctor", "--self-test", "--json"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    run = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=LIMIT_S - 20)
    assert run.returncode == 0, f"{run.stdout[-3000:]}{run.stderr[-1000:]}"
    return {"report": json.loads(run.stdout)}


CHECKS: dict[str, Callable[[str], dict[str, Any]]] = {
    "environment": check_environment,
    "ipc": check_ipc,
    "reuse": check_reuse,
    "dead-receiver": check_dead_receiver,
    "streams": check_streams,
    "devices": check_devices,
    "group": check_group,
    "self-test": check_self_test,
}
