"""Scores from a served reward model, and the TorchRL transform that writes them as rewards.

May be imported from here: the names in ``__all__``; they are also in the package root.
"""

from torchrl_sglang.scores.model import RewardModel
from torchrl_sglang.scores.transform import RewardModelTransform

__all__ = ["RewardModel", "RewardModelTransform"]
