"""Rewards from a model: texts in, one number each out, and the TorchRL transform that makes a reward of it."""

from torchrl_sglang.scores.model import RewardModel
from torchrl_sglang.scores.transform import RewardModelTransform

__all__ = ["RewardModel", "RewardModelTransform"]
