"""What a trainer's model says of sampled tokens: log-probs, entropies, hidden states, and nothing computed in vain.

``B`` answers, ``N`` response tokens of all, ``V`` vocabulary, ``H`` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchrl_sglang.recipes.batch.sequences import Sequences

__all__ = ["TokenScores", "hidden_states", "score_in_parts", "score_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """A model's view of response tokens.

    Attributes:
        log_probs_N: float32, with gradient where the model has one; of tempered logits, as the server records them.
        entropy_N: float32 without gradient, in nats; ``None`` unless asked for.
        hidden_NH: the last hidden state that predicts each token, with gradient; ``None`` unless asked for.
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
    """One forward pass over prompts and responses, padded on the left so that all responses end together.

    Logits are computed for response positions only, where the model can be told so.

    Args:
        model: a Hugging Face causal language model, or one wrapped by PEFT.
        sequences: the answers, on the model's device.
        temperature: what the tokens were sampled with; 0 (greedy) counts as 1.
        entropy: also compute entropies.
        hidden: also return hidden states, for a value head.
    """
    longest = max(sequences.lengths_B)
    output: Any = model(**_left_padded(sequences), logits_to_keep=longest + 1, output_hidden_states=hidden)
    where_BK = _response_mask(sequences, longest)
    # position i predicts token i + 1
    logits_NV = output.logits[:, -longest - 1 : -1][where_BK].float() / (temperature or 1.0)
    log_probs_NV = logits_NV.log_softmax(-1)
    response_N = torch.cat(sequences.response_B_R)
    return TokenScores(
        log_probs_N=log_probs_NV.gather(-1, response_N[:, None])[:, 0],
        entropy_N=_entropy(log_probs_NV.detach()) if entropy else None,
        hidden_NH=output.hidden_states[-1][:, -longest - 1 : -1][where_BK] if hidden else None,
    )


@torch.no_grad()
def score_in_parts(
    model: nn.Module, sequences: Sequences, *, micro_batch: int, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of all response tokens without gradient, ``micro_batch`` answers at a time; float32 of shape (N,)."""
    parts = [score_tokens(model, part, temperature=temperature).log_probs_N for _, part in sequences.split(micro_batch)]
    return torch.cat(parts)


def hidden_states(trunk: nn.Module, sequences: Sequences) -> torch.Tensor:
    """The hidden state of a model without a head that predicts each response token; (N, H), with gradient.

    Args:
        trunk: a Hugging Face model as ``AutoModel`` loads it.
        sequences: the answers, on the model's device.
    """
    longest = max(sequences.lengths_B)
    output: Any = trunk(**_left_padded(sequences))
    states_NH: torch.Tensor = output.last_hidden_state[:, -longest - 1 : -1][_response_mask(sequences, longest)]
    return states_NH


def _left_padded(sequences: Sequences) -> dict[str, Any]:
    """A model's arguments for whole sequences, padded on the left."""
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


def _response_mask(sequences: Sequences, longest: int) -> torch.Tensor:
    """True where the last ``longest`` positions of a row belong to its response."""
    first_B = longest - torch.tensor(sequences.lengths_B, device=sequences.server_N.device)
    return torch.arange(longest, device=first_B.device)[None] >= first_B[:, None]


def _entropy(log_probs_NV: torch.Tensor) -> torch.Tensor:
    return -(log_probs_NV.exp() * log_probs_NV).nan_to_num().sum(-1)
