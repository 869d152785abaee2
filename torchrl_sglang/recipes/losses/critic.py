"""Value estimates per token: a linear head on the policy's hidden states, or on a separate trunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.losses.scoring import TokenScores, hidden_states

__all__ = ["Critic"]


class Critic(nn.Module):
    """Estimates an answer's return before each of its tokens is chosen.

    Args:
        hidden_size: hidden size of the trunk.
        trunk: a model without a language model head, trained together with the value head. ``None`` puts the head on
            the policy's hidden states; its gradient then flows into the policy too.

    The head starts at zero, so the first advantages are sums of rewards.
    """

    def __init__(self, hidden_size: int, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def wants_hidden(self) -> bool:
        """Whether it needs the policy's hidden states: ``score_tokens(..., hidden=critic.wants_hidden)``."""
        return self.trunk is None

    def forward(self, sequences: Sequences, scores: TokenScores) -> torch.Tensor:
        """Compute the values of ``N`` response tokens; float32, with gradient.

        Args:
            sequences: the answers.
            scores: the policy's scores of them.

        Raises:
            ConfigError: the scores have no hidden states, but the head needs them.
        """
        hidden_NH: Any = scores.hidden_NH if self.trunk is None else hidden_states(self.trunk, sequences)
        if hidden_NH is None:
            raise ConfigError("a head on the policy's trunk needs its hidden states: score_tokens(..., hidden=True)")
        values_N: torch.Tensor = self.head(hidden_NH.float())[:, 0]
        return values_N
