"""What a sync did: version, bytes, seconds per phase, state of every server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torchrl_sglang.errors import ServerWeights

__all__ = ["SyncReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """The outcome of one successful sync.

    Attributes:
        version: version number the servers hold now.
        transport: how the weights went: ``"broadcast"``, ``"disk"`` or ``"lora"``.
        num_bytes: bytes of all tensors sent, counted once however many servers received them.
        num_tensors: number of tensors sent.
        num_buckets: number of buckets they travelled in.
        pause: pause mode used.
        seconds: seconds per phase: ``prepare`` (checks, group), ``pause``, ``begin``, ``transfer``, ``end``, ``prove``.
        generation_paused_s: seconds from the pause to the continue, in which nothing was generated.
        total_s: seconds of the whole call.
        max_logprob_gap: largest log-prob difference the proof saw between servers, and to the trainer's model when it
            could be asked; ``None`` without a proof.
        server_weights: per server URL what it holds.
    """

    version: int
    transport: str
    num_bytes: int
    num_tensors: int
    num_buckets: int
    pause: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    generation_paused_s: float = 0.0
    total_s: float = 0.0
    max_logprob_gap: float | None = None
    server_weights: Mapping[str, ServerWeights] = field(default_factory=dict)
