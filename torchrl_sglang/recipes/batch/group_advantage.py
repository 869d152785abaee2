"""Advantages of answers relative to their group, exactly 0 where all answers of a group earned the same."""

from __future__ import annotations

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from torchrl.objectives.llm import MCAdvantage

__all__ = ["GroupAdvantage", "equal_up_to_rounding"]


class GroupAdvantage(MCAdvantage):
    """TorchRL's ``MCAdvantage``, with an advantage of exactly 0 where a group's rewards are equal.

    ``MCAdvantage`` (0.14.1) subtracts a mean in float32, which can differ from equal rewards by their last bit, and
    divides by a standard deviation of at least 1e-6: eight rewards of 0.7 get an advantage of 0.06. A model would be
    trained on it although the group says nothing about which answer is better. The other groups' advantages are
    ``MCAdvantage``'s.

    Rewards, or sums of rewards with ``trajectory_return``, that differ by no more than the rounding of their dtype
    count as equal.

    Args: those of :class:`torchrl.objectives.llm.MCAdvantage`.

    Examples:
        >>> from tensordict import TensorDict
        >>> rewards = torch.tensor([0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]).reshape(8, 1, 1)
        >>> answers = {"query": ["2 + 3"] * 8, "next": {"reward": rewards, "done": torch.ones(8, 1, dtype=torch.bool)}}
        >>> answers = TensorDict(answers, batch_size=[8])
        >>> GroupAdvantage(grpo_size=8).inv(answers)["advantage"].abs().max().item()
        0.0
    """

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase | None:
        # MCAdvantage calls this method for a batch, and from there once for each trajectory. The call with a group's
        # last trajectory returns the group.
        written = super()._inv_call(tensordict)
        is_one_trajectory = tensordict.ndim == 1 and int(tensordict[self.done_key].sum()) <= 1
        if written is not None and is_one_trajectory and self._rewards_are_equal(written):
            ragged = {"as_nested_tensor": True} if isinstance(written, LazyStackedTensorDict) else {}
            advantage = written.get(self.advantage_key, **ragged)
            written.set(self.advantage_key, torch.zeros_like(advantage))
        return written

    def _rewards_are_equal(self, group: TensorDictBase) -> bool:
        rewards_S = [step.get(self.rewards_key).flatten() for step in group.unbind(0)]  # of every step of the group
        if getattr(self, "trajectory_return", None) is None:  # TorchRL 0.12 and 0.13 don't have it
            return equal_up_to_rounding(torch.cat(rewards_S))
        ends_S = [bool(step.get(self.done_key).any()) for step in group.unbind(0)]
        trajectories: list[list[torch.Tensor]] = [[]]
        for rewards, ends in zip(rewards_S, ends_S, strict=True):
            trajectories[-1].append(rewards)
            if ends:
                trajectories.append([])
        returns = self._trajectory_returns([torch.cat(steps) for steps in trajectories if steps])
        # The largest sum of magnitudes bounds the rounding of every sum.
        largest = max(float(torch.cat(steps).abs().sum()) for steps in trajectories if steps)
        return equal_up_to_rounding(returns, scale=largest, terms=max(map(len, trajectories)))


def equal_up_to_rounding(values: torch.Tensor, *, scale: float | None = None, terms: int = 1) -> bool:
    """Whether values differ by at most two units in the last place per term that was added up.

    Args:
        values: float, any shape, not empty.
        scale: magnitude of the numbers that were rounded; the largest of ``values`` by default.
        terms: how many numbers were added up to get each value.

    Examples:
        >>> equal_up_to_rounding(torch.tensor([0.7, 0.70000005])), equal_up_to_rounding(torch.tensor([0.7, 0.70001]))
        (True, False)
    """
    values = values.double() if not values.is_floating_point() else values
    scale = float(values.abs().max()) if scale is None else scale
    return float(values.max() - values.min()) <= 2 * terms * torch.finfo(values.dtype).eps * scale
