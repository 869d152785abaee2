"""What a weight sync did: version, bytes, seconds per phase, state of every server."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torchrl_sglang.errors import ServerWeights

__all__ = ["SyncReport"]


@dataclass(slots=True, kw_only=True)
class SyncReport:
    """The record of one sync, filled in while it runs.

    Attributes:
        version: version number of the weights sent.
        transport: how the weights went: ``"broadcast"``, ``"ipc"``, ``"ipc+broadcast"``, ``"http"``, ``"disk"`` or
            ``"lora"``.
        is_staged: whether everything was packed and checked before generation was paused.
        num_bytes: bytes of all tensors sent, counted once however many servers received them.
        num_tensors: number of tensors sent.
        num_buckets: number of buckets they travelled in.
        pause: pause mode used; ``"none"`` for adapters.
        seconds: seconds per phase: ``prepare`` (checks, group, first bucket or folder), ``pause``, ``begin``,
            ``transfer``, ``end``, ``verify``.
        generation_paused_s: seconds from the pause until generation continued.
        total_s: seconds of the whole call.
        max_logprob_gap: largest log-prob difference that verification saw between servers, and to the trainer's model
            where it can be called; ``None`` without verification.
        num_checksums: number of the servers' tensors whose checksum was that of what was sent, over all ranks.
        not_compared: servers whose checksums were not compared, and tensors of which these show nothing, each with the
            reason.
        server_weights: per server URL what it holds.
    """

    version: int
    transport: str
    is_staged: bool = False
    num_bytes: int = 0
    num_tensors: int = 0
    num_buckets: int = 0
    pause: str = "none"
    seconds: dict[str, float] = field(default_factory=dict)
    generation_paused_s: float = 0.0
    total_s: float = 0.0
    max_logprob_gap: float | None = None
    num_checksums: int = 0
    not_compared: Mapping[str, str] = field(default_factory=dict)
    server_weights: Mapping[str, ServerWeights] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of this block to a phase."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
