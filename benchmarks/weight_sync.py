"""Measures a whole weight sync as a multiple of one raw broadcast of the same bytes.

    python benchmarks/weight_sync.py                      # SmolLM2-135M, every transport: 8 minutes, 8 GB
    python benchmarks/weight_sync.py --servers 1 --pairs 9 --transports ipc broadcast
    python benchmarks/weight_sync.py --model /path/to/checkpoint --buckets-mb 256 --stages always
    python benchmarks/weight_sync.py --tiny --servers 1 --pairs 3        # does it run? A minute; the ratios say nothing

The two run in turn, so that other programs on the machine slow both alike:

    raw    gloo sends the model's bytes, already in one tensor, to an otherwise idle process: the lower bound
    sync   WeightSync.push(model): check values, pause servers, pack and send buckets, continue, verify

Each line is the median over the rounds, with quartiles; `paused` is the time without generation in the same unit.
Seconds depend on the machine, so ratios are printed. Targets on 2 idle cores, with checks and verification: ipc 1.8
(paused 1.0), without checks and verification 1.3; broadcast 2.3 (paused 1.8); 3 servers by ipc 1.8 times one.

This script does not measure NCCL: use `torchrl-sglang doctor --self-test` on a GPU machine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import MALLOC, Recorder, Timing, add_common_arguments, ensure_malloc_settings
from transformers import AutoModelForCausalLM

from torchrl_sglang import (
    AsyncSGLang,
    SamplingParams,
    SGLangClient,
    SGLangError,
    SGLangPool,
    SyncConfig,
    SyncReport,
    WeightSync,
)

TRANSPORTS = ("ipc", "broadcast", "http", "disk")
MANY_SERVERS = ("ipc", "broadcast")  # the others are measured with one server
MEMORY_BUCKETS_MB = 64
START_TIMEOUT_S = 600
PROMPTS, TOKENS = 16, 8  # a rollout that takes longer than a sync: 1 to 2 s on one core


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A configuration of the sync, compared with the raw broadcast."""

    name: str
    num_servers: int
    settings: dict[str, Any]


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

    def __call__(self) -> None:
        _broadcast(self._group, self._buffer)
        # gloo returns when the kernel has accepted the last byte; one byte sent back confirms that it arrived.
        self._group.recv([self._buffer[:1]], 1, 0).wait()

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


def make_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every transport with its defaults on 1, 2 and 3 servers; then, with one server, buckets, staging and checks."""
    first = args.servers[0]
    for transport in args.transports:
        for count in args.servers if transport in MANY_SERVERS else args.servers[:1]:
            if transport != "disk":
                yield _case(transport, count)
    for transport in (each for each in args.transports if each in MANY_SERVERS):
        for megabytes in args.buckets_mb:
            yield _case(transport, first, f"buckets of {megabytes:g} MB", bucket_bytes=int(megabytes * 2**20))
        for stage in args.stages:
            yield _case(transport, first, "staged" if stage == "always" else "not staged", stage=stage)
        if args.unchecked:
            yield _case(transport, first, "not verified", verify="off")
            yield _case(transport, first, "not verified or checked", verify="off", check_values=False)


def _case(transport: str, num_servers: int, label: str = "", **settings: Any) -> Case:
    name = f"{transport}, {num_servers} server{'s' if num_servers > 1 else ''}"
    settings = {"transport": transport, **settings}
    return Case(name=f"{name}, {label}" if label else name, num_servers=num_servers, settings=settings)


def measure(
    case: Case, urls: list[str], model: torch.nn.Module, raw: RawBroadcast, record: Recorder, pairs: int
) -> None:
    """Run the rounds of a case and record its row."""
    pool = SGLangPool([SGLangClient(url) for url in urls[: case.num_servers]])
    with contextlib.ExitStack() as stack:
        settings = dict(case.settings)
        if settings["transport"] == "disk":
            settings["disk_dir"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-weights-"))
        try:
            sync = stack.enter_context(contextlib.closing(WeightSync(pool, SyncConfig(**settings))))
        except SGLangError as error:
            record.failed(case.name, error)
            return
        record.measure(
            case.name,
            {"raw broadcast": raw, "sync": lambda: sync.push(model)},
            pairs=pairs,
            warm_ups=2,
            settings={**case.settings, "servers": case.num_servers},
            details=_details,
        )


def _details(base: list[Timing], other: list[Timing]) -> dict[str, Any]:
    reports: list[SyncReport] = [timing.result for timing in other]
    pairs = [(report, timing.elapsed_s) for report, timing in zip(reports, base, strict=True)]
    last = reports[-1]
    return {
        "paused": statistics.median(report.generation_paused_s / unit_s for report, unit_s in pairs),
        "phases": {
            phase: statistics.median(report.seconds.get(phase, 0.0) / unit_s for report, unit_s in pairs)
            for phase in last.seconds
        },
        "transport": last.transport,
        "staged": last.is_staged,
        "buckets": last.num_buckets,
        "pause": last.pause,
        "mb": last.num_bytes / 1e6,
    }


def measure_in_background(url: str, model: torch.nn.Module, raw: RawBroadcast, args: Any, record: Recorder) -> None:
    """How long a push with ``blocking=False`` holds the trainer's thread, and what it costs the next rollout."""
    ids = [[(7919 * index) % 300 + 1] * 8 for index in range(PROMPTS)]
    sampling = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
    for transport in (each for each in args.transports if each in MANY_SERVERS):
        for verify in ("probe", "off") if args.unchecked else ("probe",):
            name = f"{transport}, 1 server, blocking=False{'' if verify == 'probe' else ', not verified'}"
            pool = SGLangPool([SGLangClient(url)])
            config = SyncConfig(transport=transport, verify=verify, blocking=False)
            with contextlib.closing(WeightSync(pool, config)) as sync:
                sync.connect()
                start = functools.partial(sync.push_in_background, model)
                rollout = functools.partial(pool.generate, ids, sampling)
                runs = {
                    "raw broadcast": raw,
                    "until the call returns": start,
                    "a rollout alone": rollout,
                    "until that rollout and the sync end": functools.partial(_both, start, rollout),
                }
                record.measure(
                    name,
                    runs,
                    pairs=args.pairs,
                    before_each=sync.wait,
                    settings={"transport": transport, "verify": verify, "servers": 1, "tokens": PROMPTS * TOKENS},
                )


def _both(start: Callable[[], Any], rollout: Callable[[], object]) -> None:
    pending = start()
    rollout()
    pending.result()


# -------------------------------------------------------------------------------------------------------------- memory


def measure_memory(url: str, model: torch.nn.Module, args: argparse.Namespace, record: Recorder) -> None:
    """The trainer's peak memory beyond that before a sync. First of all: the allocator keeps what it once had."""
    bucket_bytes = MEMORY_BUCKETS_MB * 2**20
    sizes = [parameter.nbytes for parameter in model.parameters()]
    limit_mb = (2 * bucket_bytes + max(sizes)) / 1e6
    for transport, stage in (("broadcast", "off"), ("ipc", "off"), ("ipc", "always")):
        if transport not in args.transports:
            continue
        name = f"peak extra memory, {transport}, {'staged' if stage == 'always' else 'not staged'}"
        try:
            peak = _extra_memory(url, model, SyncConfig(transport=transport, stage=stage, bucket_bytes=bucket_bytes))
        except SGLangError as error:
            record.failed(name, error)
            continue
        allowed = f"2 buckets + largest: {limit_mb:.0f} MB" if stage == "off" else f"model: {sum(sizes) / 1e6:.0f} MB"
        record.add({"name": name, "value": f"{peak / 1e6:.0f} MB ({allowed})"})


def _extra_memory(url: str, model: torch.nn.Module, config: SyncConfig) -> int:
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


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="checkpoint to serve and to send (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, to see that everything runs")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 3], help="numbers of servers to measure")
    parser.add_argument("--buckets-mb", type=float, nargs="*", default=[16, 64, 256], help="other sizes (2**20 bytes)")
    parser.add_argument("--stages", nargs="*", choices=["off", "always"], default=["off", "always"])
    parser.add_argument("--no-unchecked", dest="unchecked", action="store_false", help="only with all checks")
    add_common_arguments(parser, pairs=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-model-") as folder:
        run(_checkpoint(args, Path(folder)), args, Recorder("sync", args.rows, args.max_repeats))


def _checkpoint(args: argparse.Namespace, folder: Path) -> str:
    from torchrl_sglang.testing import make_tiny_model, smollm2_checkpoint

    if args.tiny:
        return str(make_tiny_model(folder / "model"))
    return args.model or str(smollm2_checkpoint())


def run(path: str, args: argparse.Namespace, record: Recorder) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # private memory, as after a step; not file pages that are read lazily
    sizes = [parameter.nbytes for parameter in model.parameters()]
    print(
        f"{path}: {sum(sizes) / 1e6:.0f} MB in {len(sizes)} tensors, the largest {max(sizes) / 1e6:.0f} MB; "
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} torch threads"
    )
    print("malloc: " + " ".join(f"{name}={os.environ[name]}" for name in MALLOC), flush=True)
    started = time.monotonic()
    with AsyncSGLang.from_pretrained(
        path, dp_size=max(args.servers), device="cpu", start_timeout_s=START_TIMEOUT_S, api_key=False
    ) as engine:
        record.add({"name": "model", "value": f"{sum(sizes) / 1e6:.0f} MB in float32, {len(sizes)} tensors"})
        print(f"{max(args.servers)} servers started in {time.monotonic() - started:.0f} s", flush=True)
        urls = [client.url for client in engine.pool.clients]
        measure_memory(urls[0], model, args, record)
        raw = RawBroadcast(sum(sizes))
        try:
            for case in make_cases(args):
                measure(case, urls, model, raw, record, args.pairs)
            measure_in_background(urls[0], model, raw, args, record)
            if "disk" in args.transports:  # afterwards the server's checkpoint is a temporary folder
                measure(_case("disk", args.servers[0]), urls, model, raw, record, args.pairs)
        finally:
            raw.close()
    seconds = {row["name"]: row["seconds"] for row in record.rows if "seconds" in row}
    for transport in MANY_SERVERS:
        for count in args.servers[1:]:
            one, several = (seconds.get(_case(transport, number).name) for number in (args.servers[0], count))
            if one and several:
                print(f"{transport}, {args.servers[0]} -> {count} servers: {several / one:.2f} times as long")


if __name__ == "__main__":
    ensure_malloc_settings()
    main()
