"""Sends new weights by every transport that is possible here, checks that they arrived, and measures each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrl_sglang.config import SyncConfig
from torchrl_sglang.doctor.checks import Check, Diagnosis
from torchrl_sglang.doctor.raw_broadcast import raw_broadcast_s
from torchrl_sglang.doctor.steps import step
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.sync import WeightSync
from torchrl_sglang.weights.update.report import SyncReport

__all__ = ["check_transports"]

_NUM_SYNCS = 3
_TRANSPORTS = ("ipc", "broadcast", "http", "disk")


def check_transports(
    diagnosis: Diagnosis,
    pool: SGLangPool,
    model: nn.Module,
    tolerance: float,
    gap: Callable[[], float],
    progress: Callable[[str], None],
) -> None:
    """Show which transport is chosen and why, then use each.

    Args:
        diagnosis: gets the results. The figures of the chosen transport have names without one.
        pool: the server.
        model: the trainer's model, which is changed.
        tolerance: largest log-prob difference to the server that is explained by rounding.
        gap: measures that difference.
        progress: called with a line of text for each step.
    """
    backend = "gloo" if pool.info.device == "cpu" else "NCCL"
    advice = "see the server's log; SyncConfig(transport=...) names another transport"
    with closing(WeightSync(pool, SyncConfig())) as sync, step(diagnosis, "choice of a transport", advice) as found:
        sync.connect()
        (choice,) = sync.transport_choices.values()
        found["detail"] = f"auto takes {choice.transport}: {choice.reason}"
    with tempfile.TemporaryDirectory(prefix="torchrl-sglang-doctor-weights-") as folder:
        for transport in _TRANSPORTS:
            if transport == "ipc" and choice.transport != "ipc":
                diagnosis.add(Check(name="weight sync by ipc", status="skip", detail=choice.reason))
                continue
            progress(f"sending new weights by {transport}")
            reports = _use(diagnosis, pool, model, transport, Path(folder), tolerance, gap)
            _record(diagnosis, transport, reports, is_chosen=transport == choice.transport)
    progress("timing a bare broadcast")
    num_bytes = int(diagnosis.figures["sync_bytes"])
    with step(diagnosis, "compared with a bare broadcast", "the fault is in the network, not here") as found:
        raw_s = raw_broadcast_s(num_bytes, backend.lower())
        diagnosis.figures["raw_broadcast_s"] = raw_s
        times = []
        for transport in _TRANSPORTS:
            for part in ("sync", "paused", "transfer"):
                seconds = diagnosis.figures.get(f"{transport}_{part}_s")
                if seconds is not None:
                    diagnosis.figures[f"{transport}_{part}_to_raw"] = seconds / raw_s
            if f"{transport}_sync_to_raw" in diagnosis.figures:
                times.append(f"{transport} {diagnosis.figures[f'{transport}_sync_to_raw']:.1f}")
        diagnosis.figures["transfer_to_raw"] = diagnosis.figures["transfer_s"] / raw_s
        rate = f"{raw_s:.2f} s ({num_bytes / raw_s / 1e9:.2f} GB/s over {backend})"
        found["detail"] = f"{rate}; a whole sync takes as many times as long: {', '.join(times)}"


def _use(
    diagnosis: Diagnosis,
    pool: SGLangPool,
    model: nn.Module,
    transport: Any,
    folder: Path,
    tolerance: float,
    gap: Callable[[], float],
) -> list[SyncReport]:
    config = SyncConfig(transport=transport, disk_dir=folder if transport == "disk" else None)
    with closing(WeightSync(pool, config)) as sync:
        with step(diagnosis, f"weight sync by {transport}", "SyncConfig(transport=...) names another one") as found:
            reports = [_perturb_and_push(sync, model) for _ in range(_NUM_SYNCS)]
            fastest = min(reports, key=lambda report: report.total_s)
            found["detail"] = (
                f"{fastest.num_bytes / 1e6:.0f} MB in {fastest.total_s:.2f} s with checks and verification, generation "
                f"paused for {fastest.generation_paused_s:.2f} s"
            )
        with step(diagnosis, f"new weights served ({transport})", "please report this") as found:
            found_gap = gap()
            assert found_gap < tolerance, f"log-probs differ by {found_gap:.2g} from the model whose weights were sent"
            found["detail"] = f"largest log-prob difference to the model {found_gap:.1e}"
    diagnosis.figures["logprob_gap_after_sync"] = max(found_gap, diagnosis.figures.get("logprob_gap_after_sync", 0.0))
    return reports


def _record(diagnosis: Diagnosis, transport: str, reports: list[SyncReport], *, is_chosen: bool) -> None:
    """Add the figures of the fastest sync. The transfer is only a part of it, and not the same one everywhere."""
    fastest = min(reports, key=lambda report: report.total_s)
    seconds = min(report.seconds["transfer"] for report in reports)
    figures = {
        "sync_s": fastest.total_s,
        "paused_s": fastest.generation_paused_s,
        "transfer_s": seconds,
        "sync_gb_per_s": fastest.num_bytes / seconds / 1e9,
    }
    diagnosis.figures |= {f"{transport}_{name}": value for name, value in figures.items()}
    if is_chosen:
        diagnosis.figures |= {**figures, "sync_bytes": fastest.num_bytes}


@torch.no_grad()
def _perturb_and_push(sync: WeightSync, model: nn.Module) -> SyncReport:
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    report = sync.push(model)
    assert report is not None  # only ranks > 0 of a sharded model get none
    return report
