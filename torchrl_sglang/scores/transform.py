"""``RewardModelTransform``: rewards of a TorchRL environment from a served reward model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey
from torchrl.data import Composite, Unbounded
from torchrl.data.llm import History
from torchrl.envs import Transform

from torchrl_sglang.chat_templates import check_template_kwargs
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.rollout.messages import history_messages
from torchrl_sglang.scores.model import RewardModel

__all__ = ["RewardModelTransform"]


class RewardModelTransform(Transform):
    """Writes the score of each conversation as its reward.

    For ``ChatEnv`` and environments like it: the whole text (prompt and response) is scored after each step, and the
    reward has shape ``(*batch, 1, 1)``, as that of TorchRL's own reward parsers.

    Args:
        model: the reward model, or the URL of its server.
        in_key: what to score: ``("history", "full")`` (rendered with the *reward model's* chat template, tool calls
            included) or ``("text", "full")`` (scored unchanged, so with the policy's chat template), or any key with
            such values. ``None`` is the history if there is one, else the text.
        out_key: where the reward is written.
        template_kwargs: variables of the reward model's chat template, such as ``tools``.

    Raises:
        ConfigError: in a step, when nothing is at ``in_key``.

    Examples:
        >>> env = ChatEnv(batch_size=(4,)).append_transform(RewardModelTransform("http://host:30000"))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: RewardModel | str,
        *,
        in_key: NestedKey | None = None,
        out_key: NestedKey = "reward",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(in_keys=[], out_keys=[out_key])
        self.model = RewardModel(model) if isinstance(model, str) else model
        self.in_key = in_key
        self.template_kwargs = check_template_kwargs(template_kwargs)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        texts = self._texts(tensordict)
        shape = next_tensordict.batch_size
        if len(texts) != shape.numel():
            raise ConfigError(f"{len(texts)} texts at {self.in_key!r} for a batch of shape {tuple(shape)}")
        values = self.model.get_scores(texts, template_kwargs=self.template_kwargs)
        scores = torch.tensor(values, dtype=torch.float32, device=next_tensordict.device)
        next_tensordict.set(self.out_keys[0], scores.reshape(*shape, 1, 1))
        return next_tensordict

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """The reward has a token dimension and a value dimension of size 1, as GRPO's advantage needs."""
        reward_spec[self.out_keys[0]] = Unbounded((*reward_spec.shape, 1, 1))
        return reward_spec

    def _texts(self, tensordict: TensorDictBase) -> list[Any]:
        keys = [("history", "full"), ("text", "full")] if self.in_key is None else [self.in_key]
        for key in keys:
            value = tensordict.get(key, None, as_list=True)
            if value is None:
                continue
            if isinstance(value, History):
                return _conversations(value)
            if is_tensor_collection(value):
                value = value.tolist()
            return [value] if isinstance(value, str) else _flat(value)
        raise ConfigError(f"nothing to score: the step's TensorDict has none of {keys}")


def _conversations(history: History) -> list[Any]:
    """The messages of each conversation; they may have different numbers of messages."""
    if history.ndim == 1:
        return [history_messages(history)]
    return [conversation for part in history.unbind(0) for conversation in _conversations(part)]


def _flat(values: Any) -> list[Any]:
    """Nested lists as one list; a ``History`` becomes a list of messages."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, History):
            flat.extend(_conversations(value))
        elif isinstance(value, (list, tuple)):
            flat.extend(_flat(value))
        else:
            flat.append(value)
    return flat
