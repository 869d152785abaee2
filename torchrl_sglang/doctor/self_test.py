"""The doctor's end-to-end test: start a server, generate, compare with the model, sync new weights, verify, measure."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams, ServerConfig, SyncConfig
from torchrl_sglang.doctor.checks import Check, Diagnosis
from torchrl_sglang.doctor.raw_broadcast import raw_broadcast_s
from torchrl_sglang.errors import SGLangError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.testing import make_tiny_model
from torchrl_sglang.weights.sync import WeightSync
from torchrl_sglang.weights.update.report import SyncReport
from torchrl_sglang.weights.update.verification import probe_ids, trainer_logprobs

__all__ = ["placed_server", "self_test"]

_NUM_SYNCS = 3
_NUM_PROMPTS = 16
_NEW_TOKENS = 32


def self_test(
    diagnosis: Diagnosis, server: ServerConfig | None = None, *, progress: Callable[[str], None] | None = None
) -> None:
    """Run every step of a training run once and add the results to ``diagnosis``.

    With enough GPUs the server gets the first ones and the trainer the last, and weights are sent over NCCL in
    bfloat16. Otherwise everything runs on the CPU, over gloo, in float32.

    Args:
        diagnosis: gets the results.
        server: how to launch the server (its Python, for example); its model is replaced by a small one.
        progress: called with a line of text for each step.
    """
    report = progress or (lambda line: None)
    with tempfile.TemporaryDirectory(prefix="torchrl-sglang-doctor-") as folder:
        report("making a small model")
        model_path = make_tiny_model(Path(folder) / "tiny", hidden=512, layers=8, heads=8, kv_heads=4)
        config = placed_server(replace(server or ServerConfig(model="-"), model=str(model_path)))
        report("starting a server (20 s and more)")
        launched = SGLangServer(config)
        try:
            with _step(diagnosis, "server start", "its log's tail is above; `torchrl-sglang serve` shows all of it"):
                start = time.monotonic()
                launched.start(progress=report)
                diagnosis.figures["server_start_s"] = time.monotonic() - start
            pool = SGLangPool([SGLangClient(launched.url)])
            _test_pool(diagnosis, pool, model_path, report)
        except _StepFailed:
            pass
        finally:
            launched.stop(kill=True)


class _StepFailed(Exception):
    """A step failed, and the next steps depend on it."""


@contextmanager
def _step(diagnosis: Diagnosis, name: str, next_step: str) -> Iterator[dict[str, str]]:
    """Add the result of a step; the block may set ``detail``, which is shown in place of the duration."""
    found: dict[str, str] = {"detail": ""}
    start = time.monotonic()
    try:
        yield found
    except (SGLangError, AssertionError) as error:
        diagnosis.add(Check(name=name, status="fail", detail=str(error), next_step=next_step))
        raise _StepFailed from error
    detail = found["detail"] or f"{time.monotonic() - start:.1f} s"
    diagnosis.add(Check(name=name, status="pass", detail=detail))


def _test_pool(diagnosis: Diagnosis, pool: SGLangPool, model_path: Path, report: Callable[[str], None]) -> None:
    from transformers import AutoModelForCausalLM

    on_gpu = pool.info.device != "cpu"
    dtype, tolerance = (torch.bfloat16, 0.3) if on_gpu else (torch.float32, 1e-3)
    device = torch.device("cuda", torch.cuda.device_count() - 1) if on_gpu else torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).to(device).eval()
    report("comparing the server with the model")
    with _step(
        diagnosis, "log-probs equal the model's", "trainer and server compute differently: check dtypes"
    ) as found:
        gap = _gap(pool, model)
        found["detail"] = f"largest difference {gap:.1e}"
        assert gap < tolerance, f"they differ by {gap:.2g}, which is more than {dtype} explains"
        diagnosis.figures["logprob_gap"] = gap
    with _step(diagnosis, "generation", "see the server's log") as found:
        tokens_per_s = _throughput(pool)
        diagnosis.figures["generate_tokens_per_s"] = tokens_per_s
        found["detail"] = f"{tokens_per_s:.0f} tokens/s with {_NUM_PROMPTS} prompts in parallel"
    sync = WeightSync(pool, SyncConfig())
    try:
        _test_syncs(diagnosis, pool, sync, model, tolerance, report)
    finally:
        sync.close()


def _test_syncs(
    diagnosis: Diagnosis,
    pool: SGLangPool,
    sync: WeightSync,
    model: Any,
    tolerance: float,
    progress: Callable[[str], None],
) -> None:
    progress("sending new weights")
    backend = "gloo" if pool.info.device == "cpu" else "NCCL"
    advice = f"{backend} could not transfer the weights; SyncConfig(transport='disk') needs no process group"
    with _step(diagnosis, f"weight sync over {backend}", advice) as found:
        reports = [_perturb_and_push(sync, model) for _ in range(_NUM_SYNCS)]
        report = reports[-1]
        seconds = [each.seconds["transfer"] for each in reports]
        num_bytes = report.num_bytes
        rate = num_bytes / min(seconds) / 1e9
        diagnosis.figures |= {"sync_s": report.total_s, "sync_bytes": num_bytes, "sync_gb_per_s": rate}
        found["detail"] = (
            f"{num_bytes / 1e6:.0f} MB in {min(seconds):.2f} s ({rate:.2f} GB/s), version {report.version}"
        )
    with _step(
        diagnosis, "the server answers as the new model", "the server has wrong weights: please report this"
    ) as found:
        gap = _gap(pool, model)
        assert gap < tolerance, f"log-probs differ by {gap:.2g} from the model whose weights were sent"
        found["detail"] = f"largest log-prob difference {gap:.1e} after {_NUM_SYNCS} syncs"
        diagnosis.figures["logprob_gap_after_sync"] = gap
    progress("timing a bare broadcast")
    with _step(
        diagnosis, "compared with a bare broadcast", "the fault is in the network between two processes, not here"
    ) as found:
        raw_s = raw_broadcast_s(num_bytes, backend.lower())
        diagnosis.figures |= {"raw_broadcast_s": raw_s, "transfer_to_raw": min(seconds) / raw_s}
        times = min(seconds) / raw_s
        found["detail"] = (
            f"{num_bytes / raw_s / 1e9:.2f} GB/s bare; transfer and loading take {times:.1f} times as long"
        )


def placed_server(config: ServerConfig) -> ServerConfig:
    """Settings with the server on the first GPUs; the last is the trainer's (NCCL needs one GPU per process)."""
    if torch.cuda.device_count() > config.tp_size and config.device != "cpu":
        return replace(config, dtype="bfloat16", gpus=config.gpus or tuple(range(config.tp_size)))
    return replace(config, dtype="float32", device="cpu" if config.device == "auto" else config.device)


def _gap(pool: SGLangPool, model: nn.Module) -> float:
    ids = probe_ids(pool.vocab_size or 2)
    (reply,) = pool.score([ids])
    served = torch.tensor([value for value in reply.prompt_logprobs or [] if value is not None], dtype=torch.float64)
    gap = float((served - trainer_logprobs(model, ids)).abs().max())
    return math.inf if math.isnan(gap) else gap  # NaN would pass every comparison with a limit


def _throughput(pool: SGLangPool) -> float:
    ids = probe_ids(pool.vocab_size or 2)
    sampling = SamplingParams(max_new_tokens=_NEW_TOKENS, ignore_eos=True)
    pool.generate([ids[:4]], SamplingParams(max_new_tokens=2))
    start = time.monotonic()
    replies = pool.generate([ids[: 2 + index % 8] for index in range(_NUM_PROMPTS)], sampling)
    tokens = sum(len(reply.output_ids) for reply in replies)
    assert tokens == _NUM_PROMPTS * _NEW_TOKENS, f"{tokens} tokens came back instead of {_NUM_PROMPTS * _NEW_TOKENS}"
    return tokens / (time.monotonic() - start)


@torch.no_grad()
def _perturb_and_push(sync: WeightSync, model: nn.Module) -> SyncReport:
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    report = sync.push(model)
    assert report is not None  # only ranks > 0 of a sharded model get none
    return report
