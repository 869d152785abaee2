"""PEFT models with adapters of many kinds, and what a real server answers with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from torchrl_sglang import SamplingParams, SGLangPool, WeightSync
from torchrl_sglang.weights.update.verification import trainer_logprobs

__all__ = ["MAX_RANK", "PROMPT", "adapted", "lora_flags", "worst_gap"]

MAX_RANK = 16
PROMPT = [1, 72, 101, 108, 108, 111, 33, 57, 200, 17, 90]


def lora_flags(*targets: str) -> tuple[str, ...]:
    return (
        *("--enable-lora", "--max-lora-rank", str(MAX_RANK), "--lora-target-modules", *targets),
        *("--lora-backend", "torch_native", "--max-loras-per-batch", "4"),
    )


def adapted(
    folder: Path, configs: Sequence[Mapping[str, Any]], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """A PEFT model with an adapter per configuration, all in effect, with values that change every answer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for number, config in enumerate(configs):
        lora = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config})
        if number == 0:
            model = peft.get_peft_model(model, lora, adapter_name="a0")
        else:
            model.add_adapter(f"a{number}", lora)
    model.base_model.set_adapter(list(model.peft_config))
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return model.eval()


def worst_gap(pool: SGLangPool, sync: WeightSync, model: Any, reference: Any = None) -> float:
    """Send the adapter, generate with it, and compare the log-probs with PEFT's own.

    Args:
        pool: the server.
        sync: sends; unless it does not verify, its own comparison (a scored prompt) counts too.
        model: has the adapter.
        reference: the model to compare with; ``None`` is ``model``.

    Returns:
        Largest difference, in nats.
    """
    report = sync.push(model)
    assert report is not None
    model = model if reference is None else reference
    (reply,) = pool.generate([PROMPT], SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True))
    expected = trainer_logprobs(model, PROMPT + list(reply.output_ids))[len(PROMPT) - 1 :]
    got = torch.tensor(reply.output_logprobs, dtype=torch.float64)
    return max(report.max_logprob_gap or 0.0, float((expected - got).abs().max()))
