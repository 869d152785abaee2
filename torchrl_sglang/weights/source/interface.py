"""The interface of every source of weights: a module, a TensorDict, a dict or an iterator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.source.shards import Ranks

__all__ = ["WeightSource"]


class WeightSource(ABC):
    """The trainer's tensors under checkpoint names.

    Attributes:
        is_sender: whether this rank sends. The other ranks make the same calls, because gathering is collective, and
            send nothing.
        ranks: the ranks over which the tensors are sharded, so that reading one is collective; ``None`` if they are
            not.
        module: the trainer's transformers model, if the weights contain exactly one; else ``None``.
        one_shot: whether the tensors can be read only once, so that no value is known before it is sent.
        omitted_names: checkpoint names that the trainer's model class does not load (layers for speculative decoding).
            The coverage check ignores them.
        architecture: transformers class of the model that the tensors are of, if known.
        peft_config: configuration of the adapter that the tensors belong to; ``None`` for a model's own tensors.
    """

    is_sender: bool = True
    ranks: Ranks | None = None
    module: nn.Module | None = None
    one_shot: bool = False
    omitted_names: tuple[str, ...] = ()
    architecture: str | None = None
    peft_config: Any = None

    @property
    def is_sharded(self) -> bool:
        """Whether the tensors are sharded over several ranks."""
        return self.ranks is not None

    @abstractmethod
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors to be sent, by checkpoint name and in order."""

    @abstractmethod
    def tensors(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Read tensors one at a time, detached, on their own device. A tensor may share memory with the live weight.

        At most one tensor is in memory if the caller drops each tensor before it takes the next.

        Args:
            names: which tensors, in this order; ``None`` reads all of :meth:`specs`. The same on every rank.
        """

    @abstractmethod
    def check_values(self, names: Sequence[str] | None = None, target: torch.dtype | None = None) -> None:
        """Refuse NaN and infinity; gathers and merges nothing.

        Args:
            names: which tensors; ``None`` checks all.
            target: dtype that the tensors will be cast to; a value that it can't represent is refused, too.

        Raises:
            WeightCoverageError: naming the tensors, on all ranks alike.
        """
