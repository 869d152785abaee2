"""An endurance run: generate and sync, over and over, on servers that an engine launched; does anything grow?

    python -m tests.soak                       # an hour: `make soak`
    python -m tests.soak --seconds 60 --report soak.json

Prints the trend of each quantity, writes them with all samples as JSON, and exits with 1 if one certainly grows by more
than its limit, or if a batch or sync failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from tests.soak.trend import Trend, trend_of
from tests.soak.usage import folder_bytes, usage
from torchrl_sglang import AsyncSGLang, SamplingParams, SyncConfig, WeightSync
from torchrl_sglang.testing import make_tiny_model

# The largest growth over the run that passes, as a share of the median. Memory: allocators keep what they once used, so
# it grows in steps for a while. Latency: other programs use the machine too.
LIMITS = {
    "trainer_memory_mb": 0.05,
    "trainer_descriptors": 0.02,
    "trainer_threads": 0.02,
    "servers_memory_mb": 0.05,
    "servers_descriptors": 0.02,
    "servers_threads": 0.02,
    "generate_s": 0.25,
    "stream_s": 0.25,
    "sync_s": 0.25,
}
MAX_LOG_BYTES = 2 * (64 << 20)  # of one server: the log and the rotated one
WARM_UP = 0.2  # share of the run whose samples don't count
PROMPTS = 16


def main(words: list[str] | None = None) -> int:
    """Parse the command line, run, print and write the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="default: 3600")
    parser.add_argument("--servers", type=int, default=2, help="real servers (default: 2)")
    parser.add_argument("--report", type=Path, default=Path("outputs/soak.json"))
    args = parser.parse_args(words)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        report = run(args.seconds, args.servers, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    args.report.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 1 if report["findings"] else 0


def run(seconds: float, num_servers: int, folder: Path) -> dict[str, Any]:
    """One run; the report."""
    path = make_tiny_model(folder / "model", arch="llama", seed=0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    logs = folder / "logs"
    settings = {"device": "cpu", "start_timeout_s": 300, "log_dir": logs}
    with AsyncSGLang.from_pretrained(str(path), dp_size=num_servers, **settings) as engine:
        sync = WeightSync(engine.pool, SyncConfig(bucket_bytes=60_000))
        samples = _work(engine, sync, model, seconds, logs)
        sync.close()
        pids = [pid for server in engine.servers if (pid := server.pid) is not None]
        log_bytes = folder_bytes(logs)
    trends = _trends(samples, seconds)
    findings = [
        f"{name} grows by {trend.growth:.1%} (at least {trend.sure_growth:.1%}), limit {LIMITS[name]:.0%}"
        for name, trend in trends.items()
        if trend.sure_growth > 0 and trend.growth > LIMITS[name]
    ]
    if len(pids) != num_servers:
        findings.append(f"{num_servers - len(pids)} servers have ended")
    if log_bytes > MAX_LOG_BYTES * num_servers:
        findings.append(f"the logs are {log_bytes / 1e6:.0f} MB")
    return {
        "seconds": seconds,
        "servers": num_servers,
        "batches": sum(sample["batches"] for sample in samples),
        "sequences": sum(sample["sequences"] for sample in samples),
        "syncs": sum(sample["syncs"] for sample in samples),
        "log_mb_per_hour": log_bytes / 1e6 / seconds * 3600,
        "trends": {name: asdict(trend) for name, trend in trends.items()},
        "findings": findings,
        "samples": samples,
    }


def _work(engine: AsyncSGLang, sync: WeightSync, model: Any, seconds: float, logs: Path) -> list[dict[str, float]]:
    """Rounds of batches, streams and a sync; a sample of everything every so often."""
    start = time.monotonic()
    window_s = max(1.0, seconds / 180)
    samples: list[dict[str, float]] = []
    window = _Window()
    round_ = 0
    trainer = psutil.Process()
    while (now := time.monotonic()) < start + seconds:
        _round(engine, sync, model, round_, window)
        round_ += 1
        if time.monotonic() - window.start >= window_s:
            servers = trainer.children(recursive=True)
            samples.append(
                {
                    "at_s": round(now - start, 2),
                    **{f"trainer_{name}": value for name, value in usage([trainer]).items()},
                    **{f"servers_{name}": value for name, value in usage(servers).items()},
                    "log_bytes": folder_bytes(logs),
                    **window.figures(),
                }
            )
            window = _Window()
    return samples


class _Window:
    """What happened since the last sample."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.seconds: dict[str, list[float]] = {"generate_s": [], "stream_s": [], "sync_s": []}
        self.sequences = 0

    def figures(self) -> dict[str, float]:
        medians = {name: statistics.median(values) for name, values in self.seconds.items() if values}
        counts = {"batches": len(self.seconds["generate_s"]), "syncs": len(self.seconds["sync_s"])}
        return {**medians, **counts, "sequences": self.sequences}


def _round(engine: AsyncSGLang, sync: WeightSync, model: Any, number: int, window: _Window) -> None:
    sampling = SamplingParams(max_new_tokens=16, temperature=1.0, ignore_eos=True)
    prompts = [[1, 3 + number % 250, 3 + number // 250 % 250, 3 + index] for index in range(PROMPTS)]
    for _ in range(2):
        with _timed(window.seconds["generate_s"]):
            replies = engine.pool.generate(prompts, sampling)
        assert len(replies) == PROMPTS
        window.sequences += PROMPTS
    with _timed(window.seconds["stream_s"]):
        *_, last = engine.pool.stream(prompts[0], sampling)
    assert len(last.output_ids) == 16
    window.sequences += 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.001 * torch.randn_like(parameter)
    with _timed(window.seconds["sync_s"]):
        sync.push(model)


class _timed:
    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self._seconds.append(time.monotonic() - self._start)


def _trends(samples: list[dict[str, float]], seconds: float) -> dict[str, Trend]:
    counted = [sample for sample in samples if sample["at_s"] >= WARM_UP * seconds]
    times_s = [sample["at_s"] for sample in counted]
    return {name: trend_of(times_s, [sample[name] for sample in counted]) for name in LIMITS}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['seconds']:g} s on {report['servers']} servers: {report['batches']} batches, {report['syncs']} syncs,"
        f" {report['sequences']} sequences; logs grow by {report['log_mb_per_hour']:.1f} MB an hour",
        f"{'':22}{'median':>12}{'per hour':>12}{'99 % interval':>24}{'in this run':>14}",
    ]
    for name, trend in report["trends"].items():
        interval = f"{trend['low']:.4g} .. {trend['high']:.4g}"
        lines.append(
            f"{name:22}{trend['median']:12.4g}{trend['per_hour']:12.4g}{interval:>24}{trend['growth']:>13.1%} "
        )
    lines += [f"FOUND {finding}" for finding in report["findings"]]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
