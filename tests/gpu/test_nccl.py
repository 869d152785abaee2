"""The broadcast transport over NCCL; needs GPUs and SGLang's GPU build: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.loop.sync_cases import load
from torchrl_sglang import AsyncSGLang, SyncConfig, WeightSync
from torchrl_sglang.cli import main
from torchrl_sglang.weights.update.verification import trainer_logprobs

PROMPT = [1, 72, 101, 108, 108, 111]
# SGLang and transformers round differently in half precision; the two models differ by much more.
ATOL = 0.3

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def need_gpus(count: int) -> None:
    found = torch.cuda.device_count()
    if found < count:
        pytest.fail(f"this test needs {count} GPUs, there are {found}: deselect it with -k")


def test_the_self_test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    need_gpus(2)
    code = main(["doctor", "--self-test", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0, report
    assert any("NCCL" in check["name"] and check["status"] == "pass" for check in report["checks"]), report


@pytest.mark.parametrize("tp_size", [1, 2])
def test_two_servers_report_the_log_probs_of_the_model_on_the_last_gpu(
    tiny_llama: Path, tiny_llama_b: Path, tp_size: int
) -> None:
    need_gpus(2 * tp_size + 1)
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    with (
        AsyncSGLang.from_pretrained(str(tiny_llama), dp_size=2, tp_size=tp_size, dtype="bfloat16") as engine,
        closing(WeightSync(engine.pool, SyncConfig())) as sync,
    ):
        for version, folder in enumerate((tiny_llama_b, tiny_llama), start=1):
            model = load(folder).to(device, torch.bfloat16)
            report = sync.push(model)
            assert report is not None
            assert set(report.server_weights.values()) == {"new"}
            assert report.version == version
            expected = trainer_logprobs(model, PROMPT)
            for client in engine.pool.clients:
                (reply,) = AsyncSGLang.connect(client.url, api_key=engine.api_key).pool.score([PROMPT])
                found = torch.tensor(reply.prompt_logprobs[1:], dtype=torch.float64)
                assert (found - expected).abs().max() < ATOL
