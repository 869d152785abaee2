"""TensorClasses of scored sequences (``generate=False``).

Shapes: ``B`` sequences of ``T`` tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import MetaData
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from torchrl_sglang.errors import ProtocolError
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.rollout.tensorclasses import Padding, first_zero, to_rows

__all__ = ["score_rows"]


def score_rows(
    ids_B_T: Sequence[Sequence[int]],
    replies_B: Sequence[GenerateReply],
    padding: Padding,
    *,
    assistant_B_T: Sequence[Sequence[bool]] | None = None,
    valid_B: Sequence[bool] | None = None,
) -> list[dict[str, Any]]:
    """``tokens.full``, ``masks`` and ``log_probs.full`` of every sequence; padded on the left when padded.

    The first token of a sequence is conditioned on nothing; its log-prob is 0, as in TorchRL's wrappers. Temperature
    is not applied to these log-probs.

    Args:
        ids_B_T: the sequences.
        replies_B: the servers' replies; only ``prompt_logprobs`` is read.
        padding: dense or ragged.
        assistant_B_T: which tokens the assistant wrote, if known.
        valid_B: which sequences were scored; the masks of the others are all ``False``.

    Raises:
        ProtocolError: a reply has another number of log-probs than its sequence has tokens.
    """
    for index, (ids_T, reply) in enumerate(zip(ids_B_T, replies_B, strict=True)):
        known = len(reply.prompt_logprobs or ())
        if known != len(ids_T):
            raise ProtocolError(
                f"{reply.server} answered {known} prompt log-probs for the {len(ids_T)} tokens of batch index {index}",
                server=reply.server,
            )
    mark = MetaData(padding.enabled)
    full = to_rows(ids_B_T, torch.long, padding, padding.value, "left")
    valid_B = valid_B or [True] * len(ids_B_T)
    attended_B_T = [[valid] * len(ids_T) for ids_T, valid in zip(ids_B_T, valid_B, strict=True)]
    attended = to_rows(attended_B_T, torch.bool, padding, False, "left")
    scores = to_rows([first_zero(r.prompt_logprobs or []) for r in replies_B], torch.float32, padding, 0.0, "left")
    assistant: Sequence[torch.Tensor | None] = [None] * len(full)
    if assistant_B_T is not None:
        written_B_T = [
            mask_T if valid and len(mask_T) == len(ids_T) else [False] * len(ids_T)
            for mask_T, ids_T, valid in zip(assistant_B_T, ids_B_T, valid_B, strict=True)
        ]
        assistant = to_rows(written_B_T, torch.bool, padding, False, "left")
    return [
        {
            "tokens": Tokens(full=f, padded=mark),
            "masks": Masks(all_attention_mask=a, all_assistant_mask=m, padded=mark),
            "log_probs": LogProbs(full=s, padded=mark),
        }
        for f, a, m, s in zip(full, attended, assistant, scores, strict=True)
    ]
