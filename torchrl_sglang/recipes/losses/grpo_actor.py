"""The actor for TorchRL's ``GRPOLoss`` that scores response tokens only, at the sampling temperature.

``B`` answers; ``N`` response tokens of all answers; ``R`` positions of responses padded on the left.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.objectives.llm import GRPOLoss

from torchrl_sglang.config.checking import require, require_number
from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.losses.scoring import TokenScores, response_mask, score_tokens

__all__ = ["GRPOActor", "SampledTokens", "make_grpo_loss"]


class SampledTokens:
    """Log-probs of the sampled tokens, with the two members of a distribution that ``GRPOLoss`` uses.

    Args:
        log_probs_N: float32, with gradient.
        sequences: the answers.

    Attributes:
        mask: bool of shape (B, R); ``False`` for padding.
    """

    def __init__(self, log_probs_N: torch.Tensor, sequences: Sequences) -> None:
        self.mask = response_mask(sequences)
        self._log_probs_N = log_probs_N
        self._response_N = torch.cat(sequences.response_B_R)

    def log_prob(self, tokens_BR: torch.Tensor) -> torch.Tensor:
        """Log-probs of the sampled tokens, 0 for padding; float32 of shape (B, R).

        Raises:
            ConfigError: other tokens than the sampled ones.
        """
        is_sampled = tokens_BR.shape == self.mask.shape and torch.equal(tokens_BR[self.mask], self._response_N)
        require(is_sampled, "GRPOActor scores response tokens only: make_grpo_loss sets the loss's keys accordingly")
        padded_BR = self._log_probs_N.new_zeros(self.mask.shape)
        return padded_BR.masked_scatter(self.mask, self._log_probs_N)


class GRPOActor(nn.Module):
    """Scores sampled answers for ``GRPOLoss`` in one forward pass, and keeps the scores for a step's metrics.

    TorchRL's ``TransformersWrapper`` does not apply the sampling temperature to log-probs, and computes logits for the
    prompt too.

    Args:
        model: a Hugging Face causal language model, or one wrapped by PEFT.
        temperature: the sampling temperature; 0 (greedy) counts as 1.
        entropy: also compute entropies, for metrics.

    Attributes:
        scores: the scores of the latest forward pass, without gradient; answers in the order of its batch.
    """

    scores: TokenScores

    def __init__(self, model: nn.Module, *, temperature: float, entropy: bool = False) -> None:
        super().__init__()
        require_number("temperature", temperature, at_least=0)
        self.model = model
        self.temperature = temperature
        self.entropy = entropy

    def get_dist(self, td: TensorDictBase, logits_key: str = "logits") -> SampledTokens:
        """Score a batch's answers.

        Args:
            td: see :meth:`Sequences.from_tensordict`.
            logits_key: not used; ``GRPOLoss`` passes it.
        """
        sequences = Sequences.from_tensordict(td)
        scores = score_tokens(self.model, sequences, temperature=self.temperature, entropy=self.entropy)
        self.scores = replace(scores, log_probs_N=scores.log_probs_N.detach())
        return SampledTokens(scores.log_probs_N, sequences)


def make_grpo_loss(actor: GRPOActor, *, clip_epsilon: float = 0.2) -> GRPOLoss:
    """Make TorchRL's ``GRPOLoss`` over response tokens.

    Args:
        actor: scores the answers.
        clip_epsilon: importance ratios outside ``1 +- clip_epsilon`` are clipped.
    """
    require_number("clip_epsilon", clip_epsilon, above=0, below=1)
    loss = GRPOLoss(actor, clip_epsilon=clip_epsilon, entropy_bonus=False)
    loss.set_keys(action=("tokens", "response"), sample_log_prob=("log_probs", "response"))
    return loss
