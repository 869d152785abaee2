"""How long a whole weight sync takes, as a multiple of one raw broadcast of the same bytes.

    python benchmarks/weight_sync.py                      # SmolLM2-135M, 1 and 3 servers, about 5 minutes, 8 GB
    python benchmarks/weight_sync.py --servers 1 --pairs 9
    python benchmarks/weight_sync.py --model /path/to/checkpoint --bucket-mb 256

What is compared, in turns, so that other work on the machine hurts both alike:

    raw    gloo sends the model's bytes, already in one piece, to a process that does nothing else: the floor
    sync   WeightSync.push(model): values checked, buckets packed, servers paused, told, loaded, proven, continued

Each line is the median over the pairs. Ratios, not seconds, since seconds belong to a machine. Aimed at, on 2 quiet
cores: 1.8 or less for 64 MB buckets, and less than 2.2 times as long for 3 servers as for 1.

Nothing is measured of NCCL here: a GPU machine is asked with `torchrl-sglang doctor --self-test`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from torchrl_sglang import AsyncSGLang, SGLangClient, SGLangPool, SyncConfig, SyncReport, WeightSync

# glibc gives large blocks back to the kernel and takes them anew, and each time every page is faulted in again: without
# these settings the same runs take up to twice as long, and scatter. SGLangServer sets them for its CPU servers.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
WARM_UPS = 2
# A pair during which others used more of the machine is measured again, but not for ever.
MOST_DISTURBED = 0.05
MOST_RETRIES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to sync, measured against the raw broadcast."""

    name: str
    num_servers: int
    config: SyncConfig


# ------------------------------------------------------------------------------------------------------- the floor


class RawBroadcast:
    """A process group of this process and one that only receives."""

    def __init__(self, num_bytes: int) -> None:
        self._buffer = torch.ones(num_bytes, dtype=torch.uint8)
        store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._receiver = context.Process(target=_receive, args=(store.port, num_bytes), daemon=True)
        self._receiver.start()
        self._group = dist.ProcessGroupGloo(store, 0, 2, timedelta(seconds=120))

    def seconds(self) -> float:
        start = time.perf_counter()
        _broadcast(self._group, self._buffer)
        # gloo is done when the last byte is in the kernel's hands; one byte back says that it has arrived.
        self._group.recv([self._buffer[:1]], 1, 0).wait()
        return time.perf_counter() - start

    def close(self) -> None:
        self._receiver.terminate()
        self._receiver.join()


def _receive(port: int, num_bytes: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60))
    group = dist.ProcessGroupGloo(store, 1, 2, timedelta(seconds=3600))
    buffer = torch.ones(num_bytes, dtype=torch.uint8)
    while True:
        _broadcast(group, buffer)
        group.send([buffer[:1]], 0, 0).wait()


def _broadcast(group: Any, tensor: torch.Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


# ------------------------------------------------------------------------------------------------------ what is timed


class Neighbours:
    """How much of the machine other programs use: a pair measured beside them says little."""

    def __init__(self) -> None:
        self._mark = self._now()

    def share(self) -> float:
        """Fraction of all cores used by programs that are not ours, since the last call."""
        before, self._mark = self._mark, self._now()
        busy, total, ours = (after - was for after, was in zip(self._mark, before, strict=True))
        return max(0.0, busy - ours) / total if total else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        per_second = os.sysconf("SC_CLK_TCK")
        me = psutil.Process()
        ours = 0.0
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                ours += times.user + times.system
        return (sum(ticks) - ticks[3] - ticks[4]) / per_second, sum(ticks) / per_second, ours


def measure(case: Case, urls: list[str], model: torch.nn.Module, raw: RawBroadcast, pairs: int) -> dict[str, float]:
    """Run the pairs and print a line; returns the medians in seconds."""
    neighbours = Neighbours()
    disturbed = 0
    pool = SGLangPool([SGLangClient(url) for url in urls[: case.num_servers]])
    floor: list[float] = []
    reports: list[SyncReport] = []
    with contextlib.closing(WeightSync(pool, case.config)) as sync:
        for _ in range(WARM_UPS):
            sync.push(model)
            raw.seconds()
        while len(reports) < pairs:
            neighbours.share()
            seconds = raw.seconds()
            report = sync.push(model)
            assert report is not None
            if neighbours.share() > MOST_DISTURBED and disturbed < MOST_RETRIES:
                disturbed += 1
                time.sleep(1)
                continue
            floor.append(seconds)
            reports.append(report)
    ratios = [report.total_s / seconds for report, seconds in zip(reports, floor, strict=True)]
    standstill = statistics.median(r.generation_paused_s / s for r, s in zip(reports, floor, strict=True))
    shares = {
        phase: statistics.median(report.seconds.get(phase, 0.0) / s for report, s in zip(reports, floor, strict=True))
        for phase in reports[0].seconds
    }
    last = reports[-1]
    print(
        f"{case.name:34} {statistics.median(ratios):5.2f}  {min(ratios):5.2f} ..{max(ratios):5.2f}  {standstill:6.2f}  "
        f"{last.pause:7} {last.num_buckets:3} {disturbed:4}  "
        + "  ".join(f"{phase} {share:.2f}" for phase, share in shares.items())
    )
    return {"raw": statistics.median(floor), "sync": statistics.median(report.total_s for report in reports)}


def extra_memory(url: str, model: torch.nn.Module, config: SyncConfig) -> int:
    """Peak resident bytes of this process during its first sync, over what it held before."""
    with contextlib.closing(WeightSync(SGLangPool([SGLangClient(url)]), config)) as sync:
        sync.connect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        sync.push(model)
        return resident("VmHWM") - before


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def make_cases(num_servers: list[int], bucket_bytes: int) -> list[Case]:
    cases = []
    for count in num_servers:
        servers = f"{count} server{'s' if count > 1 else ''}"
        cases.append(Case(name=servers, num_servers=count, config=SyncConfig(bucket_bytes=bucket_bytes)))
        if count == num_servers[0]:
            for what, settings in (
                ("no proof", {"verify": "off"}),
                ("no proof, values unchecked", {"verify": "off", "check_values": False}),
            ):
                config = SyncConfig(bucket_bytes=bucket_bytes, **settings)  # type: ignore[arg-type]
                cases.append(Case(name=f"{servers}, {what}", num_servers=count, config=config))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint to serve and to send (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 3], help="numbers of servers to measure")
    parser.add_argument("--pairs", type=int, default=9, help="raw broadcasts and syncs per line")
    parser.add_argument("--bucket-mb", type=float, default=64, help="most MB (2**20) per bucket")
    given = parser.parse_args()
    if given.model is None:
        from torchrl_sglang.testing import smollm2_checkpoint

        given.model = str(smollm2_checkpoint())
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # memory of its own, as after a step; else pages of the file, read late
    bucket_bytes = int(given.bucket_mb * 2**20)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    print(f"{given.model}: {sum(sizes) / 1e6:.0f} MB in {len(sizes)} tensors, the largest {max(sizes) / 1e6:.0f} MB")
    print(
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} torch threads"
    )
    print("malloc: " + " ".join(f"{name}={os.environ[name]}" for name in MALLOC))
    count = max(given.servers)
    with AsyncSGLang.from_pretrained(given.model, dp_size=count, device="cpu", start_timeout_s=600) as engine:
        run([client.url for client in engine.pool.clients], given, model, bucket_bytes)


def run(urls: list[str], given: argparse.Namespace, model: torch.nn.Module, bucket_bytes: int) -> None:
    peak = extra_memory(urls[0], model, SyncConfig(bucket_bytes=bucket_bytes))
    largest = max(parameter.nbytes for parameter in model.parameters())
    limit = 2 * bucket_bytes + largest
    print(f"trainer's peak extra memory {peak / 1e6:.0f} MB (2 buckets + largest tensor: {limit / 1e6:.0f} MB)\n")
    raw = RawBroadcast(sum(parameter.nbytes for parameter in model.parameters()))
    title = f"x raw broadcast, median of {given.pairs}"
    print(f"{title:34} whole   spread         still   pause  buckets again  phases")
    results: dict[str, dict[str, float]] = {}
    try:
        for case in make_cases(given.servers, bucket_bytes):
            results[case.name] = measure(case, urls, model, raw, given.pairs)
    finally:
        raw.close()
    first, *others = (results[case.name] for case in make_cases(given.servers, bucket_bytes) if "," not in case.name)
    print(f"\nraw broadcast {first['raw']:.3f} s; load now {os.getloadavg()[0]:.1f}")
    for count, other in zip(given.servers[1:], others, strict=True):
        print(f"{given.servers[0]} -> {count} servers: {other['sync'] / first['sync']:.2f} times as long")


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})  # read when a process starts
    main()
