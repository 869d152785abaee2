"""What every source of weights can do, wherever they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torchrl_sglang.weights.checkpoint.headers import TensorSpec

__all__ = ["WeightSource"]


class WeightSource(ABC):
    """Named tensors of a trainer.

    Attributes:
        is_sender: whether this rank sends. The others must go through the same calls (gathering is collective) and
            send nothing.
        is_sharded: the tensors are spread over several ranks, so that reading one is collective.
        module: the model that can be called, if the weights came as one; else ``None``.
        one_shot: values can be read once only, so they are not known before they are sent.
        not_held: names of the checkpoint that the trainer's model class leaves out by design (layers for speculative
            decoding): to be ignored in the coverage check.
        peft_config: configuration of the adapter that the tensors belong to; ``None`` for a model's own tensors.
    """

    is_sender: bool = True
    is_sharded: bool = False
    module: nn.Module | None = None
    one_shot: bool = False
    not_held: tuple[str, ...] = ()
    peft_config: Any = None

    @abstractmethod
    def specs(self) -> dict[str, TensorSpec]:
        """What would be sent, by checkpoint name and in order; reads no values."""

    @abstractmethod
    def tensors(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """TensorMapping tensors one at a time, detached, on the device they live on; may alias the live weights.

        Let go of each tensor before asking for the next: then never more than one is held.

        Args:
            names: which, and in which order; ``None`` is all of :meth:`specs`. The same on every rank.
        """

    @abstractmethod
    def check_values(self, names: Sequence[str] | None = None, target: torch.dtype | None = None) -> None:
        """Look for NaN and infinity without gathering or merging anything.

        Args:
            names: which tensors; ``None`` is all.
            target: dtype they will be cast to; a value it can't hold is refused too.

        Raises:
            WeightCoverageError: naming the tensors, on all ranks alike.
        """
