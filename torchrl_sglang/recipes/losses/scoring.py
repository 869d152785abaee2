"""Score sampled tokens with the trainer's model: log-probs, entropies, hidden states.

``B`` answers; ``N`` response tokens of all answers; ``R`` positions of padded responses; ``V`` vocabulary; ``H`` hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchrl_sglang.recipes.batch.sequences import Sequences

__all__ = ["TokenScores", "hidden_states", "response_mask", "score_in_parts", "score_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """A model's scores of response tokens.

    Attributes:
        log_probs_N: float32, with gradient if the model has one; computed from tempered logits, as the server does.
        entropy_N: float32 without gradient, in nats; ``None`` unless requested.
        hidden_NH: the last hidden state that predicts each token, with gradient; ``None`` unless requested.
    """

    log_probs_N: torch.Tensor
    entropy_N: torch.Tensor | None = None
    hidden_NH: torch.Tensor | None = None


def score_tokens(
    model: nn.Module,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    hidden: bool = False,
) -> TokenScores:
    """Run one forward pass over prompts and responses, padded on the left so that all responses end together.

    The model computes logits for response positions only.

    Args:
        model: a Hugging Face causal language model, or one wrapped by PEFT.
        sequences: the answers, on the model's device.
        temperature: the sampling temperature; 0 (greedy) counts as 1.
        entropy: also compute entropies.
        hidden: also return hidden states, for a value head.
    """
    longest = max(sequences.lengths_B)
    output: Any = model(**_left_padded(sequences), logits_to_keep=longest + 1, output_hidden_states=hidden)
    mask_BR = response_mask(sequences)
    # position i predicts token i + 1
    logits_NV = output.logits[:, -longest - 1 : -1][mask_BR].float() / (temperature or 1.0)
    log_probs_NV = logits_NV.log_softmax(-1)
    response_N = torch.cat(sequences.response_B_R)
    return TokenScores(
        log_probs_N=log_probs_NV.gather(-1, response_N[:, None])[:, 0],
        entropy_N=_entropy(log_probs_NV.detach()) if entropy else None,
        hidden_NH=output.hidden_states[-1][:, -longest - 1 : -1][mask_BR] if hidden else None,
    )


@torch.no_grad()
def score_in_parts(
    model: nn.Module, sequences: Sequences, *, micro_batch: int, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of all response tokens without gradient, ``micro_batch`` answers at a time; float32 of shape (N,)."""
    parts = [score_tokens(model, part, temperature=temperature).log_probs_N for _, part in sequences.split(micro_batch)]
    return torch.cat(parts)


def hidden_states(trunk: nn.Module, sequences: Sequences) -> torch.Tensor:
    """Hidden states of a model without a head, at the positions that predict response tokens; (N, H), with gradient.

    Args:
        trunk: a Hugging Face model as ``AutoModel`` loads it.
        sequences: the answers, on the model's device.
    """
    longest = max(sequences.lengths_B)
    output: Any = trunk(**_left_padded(sequences))
    states_NH: torch.Tensor = output.last_hidden_state[:, -longest - 1 : -1][response_mask(sequences)]
    return states_NH


def response_mask(sequences: Sequences) -> torch.Tensor:
    """Mask of responses padded on the left to the longest one; bool of shape (B, R).

    Examples:
        >>> from torchrl_sglang.recipes.batch.sequences import example
        >>> response_mask(example()).tolist()
        [[True, True], [False, True], [False, True]]
    """
    lengths_B = torch.tensor(sequences.lengths_B, device=sequences.server_N.device)
    longest = max(sequences.lengths_B)
    return torch.arange(longest, device=lengths_B.device)[None] >= longest - lengths_B[:, None]


def _left_padded(sequences: Sequences) -> dict[str, Any]:
    """The model's arguments for whole sequences, padded on the left."""
    full_B_L = [torch.cat(pair) for pair in zip(sequences.prompt_B_T, sequences.response_B_R, strict=True)]
    width = max(map(len, full_B_L))
    ids_BL = full_B_L[0].new_zeros(len(full_B_L), width)
    mask_BL = torch.zeros_like(ids_BL)
    for row, ids_L in enumerate(full_B_L):
        ids_BL[row, width - len(ids_L) :] = ids_L
        mask_BL[row, width - len(ids_L) :] = 1
    return {
        "input_ids": ids_BL,
        "attention_mask": mask_BL,
        "position_ids": (mask_BL.cumsum(-1) - 1).clamp(min=0),
        "use_cache": False,
    }


def _entropy(log_probs_NV: torch.Tensor) -> torch.Tensor:
    return -(log_probs_NV.exp() * log_probs_NV).nan_to_num().sum(-1)
