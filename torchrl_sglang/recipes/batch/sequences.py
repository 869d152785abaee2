"""A batch of answers as flat tensors over tokens: the input of losses and statistics.

``B`` answers; ``N`` response tokens of all answers, one answer after the other; ``T`` tokens of one prompt; ``R``
tokens of one response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDictBase

from torchrl_sglang.recipes.data.questions import POSITION_KEY

__all__ = ["Sequences"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Answers without padding.

    Attributes:
        prompt_B_T: int64 ids per answer.
        response_B_R: int64 ids per answer.
        server_N: float32; log-probs recorded by the server.
        version_N: int64; weight version of every token.
        reward_B: float32.
        right_B: bool; ``False`` if the environment does not write it.
        truncated_B: bool; the answer reached the length limit.
        position_B: int64; number of the question, -1 if the environment does not write it.
        advantage_N: float32; ``None`` until it is computed.
    """

    prompt_B_T: list[torch.Tensor]
    response_B_R: list[torch.Tensor]
    server_N: torch.Tensor
    version_N: torch.Tensor
    reward_B: torch.Tensor
    right_B: torch.Tensor
    truncated_B: torch.Tensor
    position_B: torch.Tensor
    advantage_N: torch.Tensor | None = None

    @classmethod
    def from_tensordict(cls, td: TensorDictBase) -> Sequences:
        """Read the ragged output (``pad_output=False``) of :class:`SGLangWrapper` and of an environment.

        An ``advantage`` of shape ``(B, 1, 1)``, as ``MCAdvantage`` writes it, applies to every token of its answer.

        Args:
            td: any batch shape, with ``tokens``, ``log_probs``, ``generation`` and ``("next", "reward")``.
        """
        flat_B = td.reshape(-1)
        response_B_R = _ragged(flat_B, ("tokens", "response"))
        lengths_B = torch.tensor([len(ids_R) for ids_R in response_B_R], device=response_B_R[0].device)
        reward_B = flat_B["next", "reward"].reshape(len(flat_B), -1).sum(-1).float()
        right = flat_B.get(
            ("next", "right"), flat_B.get(("next", "success"), None)
        )  # TorchRL's environments write "success"
        position = flat_B.get(POSITION_KEY, None)
        advantage = flat_B.get("advantage", None)
        return cls(
            prompt_B_T=_ragged(flat_B, ("tokens", "prompt")),
            response_B_R=response_B_R,
            server_N=torch.cat(_ragged(flat_B, ("log_probs", "response"))).float(),
            version_N=torch.cat(_ragged(flat_B, ("generation", "weight_version"))),
            reward_B=reward_B,
            right_B=torch.zeros_like(reward_B, dtype=torch.bool) if right is None else right.reshape(-1),
            truncated_B=flat_B["generation", "truncated"].reshape(-1),
            position_B=torch.full_like(lengths_B, -1) if position is None else position.reshape(-1).to(lengths_B),
            advantage_N=None if advantage is None else advantage.reshape(-1).repeat_interleave(lengths_B),
        )

    @property
    def lengths_B(self) -> list[int]:
        """Number of response tokens per answer."""
        return [len(ids_R) for ids_R in self.response_B_R]

    @property
    def num_tokens(self) -> int:
        """Number of response tokens of all answers."""
        return len(self.server_N)

    def __len__(self) -> int:
        return len(self.response_B_R)

    def next_position(self, position: int, questions: int) -> int:
        """Number of the first question after those of this batch.

        Args:
            position: the number before this batch.
            questions: number of questions in the batch, for environments that do not number them.
        """
        last = int(self.position_B.max())
        return position + questions if last < 0 else max(position, last + 1)

    def with_advantage(self, advantage_N: torch.Tensor) -> Sequences:
        """Copy with an advantage per token."""
        return replace(self, advantage_N=advantage_N)

    def per_answer(self, values_N: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split values per token into one ``(R,)`` tensor per answer."""
        return torch.split(values_N, self.lengths_B)

    def split(self, size: int) -> Iterator[tuple[slice, Sequences]]:
        """Yield parts of at most ``size`` answers, each with the slice of its tokens among the N.

        Examples:
            >>> parts = [(tokens, len(part)) for tokens, part in example().split(2)]
            >>> parts
            [(slice(0, 3, None), 2), (slice(3, 4, None), 1)]
        """
        start_N = 0
        for start_B in range(0, len(self), size):
            answers = slice(start_B, start_B + size)
            tokens = slice(start_N, start_N + sum(self.lengths_B[answers]))
            start_N = tokens.stop
            yield tokens, self._part(answers, tokens)

    def to(self, device: Any) -> Sequences:
        """Copy to a device."""
        moved = {name: _moved(getattr(self, name), device) for name in self.__slots__}
        return Sequences(**moved)

    def _part(self, answers: slice, tokens: slice) -> Sequences:
        parts: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            parts[name] = None if value is None else value[tokens if name.endswith("_N") else answers]
        return Sequences(**parts)


def example() -> Sequences:
    """Three answers with two, one and one tokens, for doctests."""
    responses = [torch.tensor([7, 8]), torch.tensor([9]), torch.tensor([6])]
    return Sequences(
        prompt_B_T=[torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5])],
        response_B_R=responses,
        server_N=torch.tensor([-1.0, -2.0, -0.5, -0.25]),
        version_N=torch.tensor([0, 1, 1, 1]),
        reward_B=torch.tensor([1.0, 0.0, 0.5]),
        right_B=torch.tensor([True, False, False]),
        truncated_B=torch.tensor([False, True, False]),
        position_B=torch.tensor([0, 0, 1]),
    )


def _ragged(flat_B: TensorDictBase, key: tuple[str, str]) -> list[torch.Tensor]:
    values: list[torch.Tensor] = list(flat_B.get(key, as_list=True))
    return values


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, list):
        return [each.to(device) for each in value]
    return None if value is None else value.to(device)
