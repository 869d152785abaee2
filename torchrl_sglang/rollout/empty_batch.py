"""The output for a batch without prompts: the entries of any other batch, of size 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data.llm import History

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.rollout.outputs import generated_rows, scored_rows
from torchrl_sglang.rollout.prompts import Prompts
from torchrl_sglang.rollout.requests import Answers
from torchrl_sglang.rollout.settings import RolloutSettings
from torchrl_sglang.rollout.tensorclasses import Padding

__all__ = ["empty_rows"]


def empty_rows(
    settings: RolloutSettings, sampling: SamplingParams, shape: Sequence[int], padding: Padding, tokenizer: Any
) -> TensorDictBase:
    """What the policy writes for no prompts. Nothing is sent.

    The entries are those of one sequence without tokens, of which none is kept.

    Args:
        settings: the policy's.
        sampling: how tokens would be drawn.
        shape: batch shape of the output; one of its sizes is 0.
        padding: how other batches are padded.
        tokenizer: only used in text and history mode.

    Returns:
        A dense TensorDict of batch shape ``shape``; entries with one value per token have a last dimension of size 0.
    """
    with_prompt = settings.writes_prompt_log_probs or not settings.generate
    n = sampling.n if settings.generate else 1
    reply = GenerateReply(
        output_ids=[], output_logprobs=[], prompt_logprobs=[] if with_prompt else None, finish_reason="stop"
    )
    prompts = Prompts(
        ids_B_T=[[]],
        texts_B=[""],
        histories_B=[History(role=["user"], content=[""], batch_size=1)],
        assistant_B_T=[[]] if settings.writes_history else None,
    )
    answers = Answers(prompts=prompts, replies_S=[reply] * n, resumes_S=[0] * n, errors_B=[""])
    if settings.generate:
        row = generated_rows(answers, settings, sampling, padding, tokenizer)[0]
    else:
        row = scored_rows(answers, settings, padding)[0]
    # One row of each size that is not 0, and no row of the others.
    dense = torch.stack([row]).reshape([1] * len(shape)).expand([max(size, 1) for size in shape])
    return dense[tuple(slice(0, size) for size in shape)]
