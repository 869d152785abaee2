"""Measures a whole weight sync as a multiple of one raw broadcast of the same bytes.

    python benchmarks/weight_sync.py                      # SmolLM2-135M, 1 and 3 servers, about 5 minutes, 8 GB
    python benchmarks/weight_sync.py --servers 1 --pairs 9
    python benchmarks/weight_sync.py --model /path/to/checkpoint --bucket-mb 256
    python benchmarks/weight_sync.py --transports ipc --stage always

The two run alternately, so that other programs on the machine slow both alike:

    raw    gloo sends the model's bytes, already in one tensor, to an otherwise idle process: the lower bound
    sync   WeightSync.push(model): check values, pause servers, pack, announce and send buckets, continue, verify

Each line is the median over the pairs. Seconds depend on the machine, so ratios are printed. Target on 2 idle cores:
1.8 or less for 64 MB buckets, and less than 2.2 times as long for 3 servers as for 1.

This script does not measure NCCL: use `torchrl-sglang doctor --self-test` on a GPU machine.
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

# glibc returns large blocks to the kernel and allocates them again, and every page is faulted in again. Without
# these settings the same runs take up to twice as long and vary more. SGLangServer sets them for its CPU servers.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
WARM_UPS = 2
# A pair during which other programs used a larger share of the CPU is repeated, up to a number of times.
MAX_OTHER_SHARE = 0.05
MAX_REPEATS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A configuration of the sync, compared with the raw broadcast."""

    name: str
    num_servers: int
    config: SyncConfig


# ----------------------------------------------------------------------------------------------------- lower bound


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
        # gloo returns when the kernel has accepted the last byte; one byte sent back confirms that it arrived.
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


# --------------------------------------------------------------------------------------------------------- weight sync


class OtherPrograms:
    """The share of the CPU that other programs use; a pair measured beside them is not reliable."""

    def __init__(self) -> None:
        self._mark = self._now()

    def share(self) -> float:
        """Fraction of all cores used by other programs since the last call."""
        before, self._mark = self._mark, self._now()
        busy, total, ours = (end - start for end, start in zip(self._mark, before, strict=True))
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
    """Run the pairs and print a line; return the medians in seconds."""
    others = OtherPrograms()
    repeats = 0
    pool = SGLangPool([SGLangClient(url) for url in urls[: case.num_servers]])
    raw_s: list[float] = []
    reports: list[SyncReport] = []
    with contextlib.closing(WeightSync(pool, case.config)) as sync:
        for _ in range(WARM_UPS):
            sync.push(model)
            raw.seconds()
        while len(reports) < pairs:
            others.share()
            seconds = raw.seconds()
            report = sync.push(model)
            assert report is not None
            if others.share() > MAX_OTHER_SHARE and repeats < MAX_REPEATS:
                repeats += 1
                time.sleep(1)
                continue
            raw_s.append(seconds)
            reports.append(report)
    ratios = [report.total_s / seconds for report, seconds in zip(reports, raw_s, strict=True)]
    paused = statistics.median(r.generation_paused_s / s for r, s in zip(reports, raw_s, strict=True))
    shares = {
        phase: statistics.median(report.seconds.get(phase, 0.0) / s for report, s in zip(reports, raw_s, strict=True))
        for phase in reports[0].seconds
    }
    last = reports[-1]
    print(
        f"{case.name:34} {statistics.median(ratios):5.2f}  {min(ratios):5.2f} ..{max(ratios):5.2f}  {paused:6.2f}  "
        f"{last.pause:7} {last.num_buckets:5} {repeats:8}  "
        + "  ".join(f"{phase} {share:.2f}" for phase, share in shares.items())
    )
    return {"raw": statistics.median(raw_s), "sync": statistics.median(report.total_s for report in reports)}


def extra_memory(url: str, model: torch.nn.Module, config: SyncConfig) -> int:
    """Peak resident bytes of this process during its first sync, beyond those before it."""
    with contextlib.closing(WeightSync(SGLangPool([SGLangClient(url)]), config)) as sync:
        sync.connect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        sync.push(model)
        return resident("VmHWM") - before


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def make_cases(args: argparse.Namespace, bucket_bytes: int) -> list[Case]:
    cases = []
    for transport in args.transports:
        settings = {"transport": transport, "stage": args.stage, "bucket_bytes": bucket_bytes}
        for count in args.servers:
            servers = f"{transport}, {count} server{'s' if count > 1 else ''}"
            cases.append(Case(name=servers, num_servers=count, config=SyncConfig(**settings)))
            if count == args.servers[0]:
                bare = {"verify": "off", "check_values": False}
                for label, more in (("not verified", {"verify": "off"}), ("not verified or checked", bare)):
                    config = SyncConfig(**settings, **more)
                    cases.append(Case(name=f"{servers}, {label}", num_servers=count, config=config))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="checkpoint to serve and to send (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 3], help="numbers of servers to measure")
    parser.add_argument("--transports", nargs="+", default=["ipc", "broadcast"], help="transports to measure")
    parser.add_argument("--stage", choices=["auto", "off", "always"], default="auto", help="see SyncConfig.stage")
    parser.add_argument("--pairs", type=int, default=9, help="raw broadcasts and syncs per line")
    parser.add_argument("--bucket-mb", type=float, default=64, help="largest bucket, in MB (2**20 bytes)")
    args = parser.parse_args()
    if args.model is None:
        from torchrl_sglang.testing import smollm2_checkpoint

        args.model = str(smollm2_checkpoint())
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # private memory, as after a step; not file pages that are read lazily
    bucket_bytes = int(args.bucket_mb * 2**20)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    print(f"{args.model}: {sum(sizes) / 1e6:.0f} MB in {len(sizes)} tensors, the largest {max(sizes) / 1e6:.0f} MB")
    print(
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} torch threads"
    )
    print("malloc: " + " ".join(f"{name}={os.environ[name]}" for name in MALLOC))
    count = max(args.servers)
    with AsyncSGLang.from_pretrained(
        args.model, dp_size=count, device="cpu", start_timeout_s=600, api_key=False
    ) as engine:
        run([client.url for client in engine.pool.clients], args, model, bucket_bytes)


def run(urls: list[str], args: argparse.Namespace, model: torch.nn.Module, bucket_bytes: int) -> None:
    config = SyncConfig(transport=args.transports[0], stage=args.stage, bucket_bytes=bucket_bytes)
    peak = extra_memory(urls[0], model, config)
    largest = max(parameter.nbytes for parameter in model.parameters())
    limit = 2 * bucket_bytes + largest
    print(f"trainer's peak extra memory {peak / 1e6:.0f} MB (2 buckets + largest tensor: {limit / 1e6:.0f} MB)\n")
    raw = RawBroadcast(sum(parameter.nbytes for parameter in model.parameters()))
    title = f"x raw broadcast, median of {args.pairs}"
    print(f"{title:34} whole  spread          paused  pause  buckets  repeats  phases")
    results: dict[str, dict[str, float]] = {}
    try:
        for case in make_cases(args, bucket_bytes):
            results[case.name] = measure(case, urls, model, raw, args.pairs)
    finally:
        raw.close()
    print(f"\nraw broadcast {next(iter(results.values()))['raw']:.3f} s; load now {os.getloadavg()[0]:.1f}")
    for transport in args.transports:
        plain = [case for case in make_cases(args, bucket_bytes) if case.name.startswith(f"{transport},")]
        first, *others = (results[case.name] for case in plain if case.name.count(",") == 1)
        for count, other in zip(args.servers[1:], others, strict=True):
            times = other["sync"] / first["sync"]
            print(f"{transport}, {args.servers[0]} -> {count} servers: {times:.2f} times as long")


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})  # read when a process starts
    main()
