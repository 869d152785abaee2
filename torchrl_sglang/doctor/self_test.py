"""The doctor's end-to-end test: start a server, generate, compare with the model, sync new weights, verify, measure."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams, ServerConfig
from torchrl_sglang.doctor.checks import Diagnosis
from torchrl_sglang.doctor.steps import StepFailed, step
from torchrl_sglang.doctor.transport_test import check_transports
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.testing import make_tiny_model
from torchrl_sglang.weights.update.verification import probe_ids, trainer_logprobs

__all__ = ["placed_server", "self_test"]

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
            with step(diagnosis, "server start", "its log's tail is above; `torchrl-sglang serve` shows all of it"):
                start = time.monotonic()
                launched.start(progress=report)
                diagnosis.figures["server_start_s"] = time.monotonic() - start
            pool = SGLangPool([SGLangClient(launched.url)])
            _test_pool(diagnosis, pool, model_path, report)
        except StepFailed:
            pass
        finally:
            launched.stop(kill=True)


def _test_pool(diagnosis: Diagnosis, pool: SGLangPool, model_path: Path, report: Callable[[str], None]) -> None:
    from transformers import AutoModelForCausalLM

    on_gpu = pool.info.device != "cpu"
    dtype, tolerance = (torch.bfloat16, 0.3) if on_gpu else (torch.float32, 1e-3)
    device = torch.device("cuda", torch.cuda.device_count() - 1) if on_gpu else torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).to(device).eval()
    report("comparing the server with the model")
    with step(
        diagnosis, "log-probs equal the model's", "trainer and server compute differently: check dtypes"
    ) as found:
        gap = _gap(pool, model)
        found["detail"] = f"largest difference {gap:.1e}"
        assert gap < tolerance, f"they differ by {gap:.2g}, which is more than {dtype} explains"
        diagnosis.figures["logprob_gap"] = gap
    with step(diagnosis, "generation", "see the server's log") as found:
        tokens_per_s = _throughput(pool)
        diagnosis.figures["generate_tokens_per_s"] = tokens_per_s
        found["detail"] = f"{tokens_per_s:.0f} tokens/s with {_NUM_PROMPTS} prompts in parallel"
    check_transports(diagnosis, pool, model, tolerance, lambda: _gap(pool, model), report)


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
