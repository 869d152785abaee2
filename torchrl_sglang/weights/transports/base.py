"""What every transport to the servers offers: one small interface, one class per transport."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import torch

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.protocol.version import WeightVersion
from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.update.session import UpdateSession

__all__ = ["PackedBuckets", "Packing", "WeightTransport"]

PackedBuckets = Generator[tuple[Bucket, torch.Tensor], None, None]
Packing = Callable[[BucketPacker], PackedBuckets]
"""Turns a packer's buffers into buckets with their bytes, each made when it is asked for."""


class WeightTransport(Protocol):
    """How weights get from the trainer to the servers."""

    name: str

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Make ready what can be made ready before anything is sent.

        Raises:
            ConfigError: a server can't be reached on this transport.
            WeightUpdateError: a server did not play along.
        """

    def send(
        self,
        clients: Sequence[SGLangClient],
        packing: Packing,
        version: WeightVersion,
        deadline: float,
        *,
        num_buckets: int | None,
    ) -> UpdateSession:
        """Put the weights on the servers.

        Args:
            clients: the servers.
            packing: makes the packed buckets, given the buffers to use.
            version: what the weights will be called.
            deadline: ``time.monotonic()`` value by which everything has to be done.
            num_buckets: how many buckets will come, if that is known.

        Returns:
            The finished session, which knows how long each phase took.

        Raises:
            WeightUpdateError: what went wrong, and what each server holds now.
        """

    def drop(self) -> None:
        """Let go of everything without asking the servers, which may be stuck."""

    def close(self) -> None:
        """Take down what was made."""
