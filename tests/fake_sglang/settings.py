"""The settings of a fake server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.fake_sglang.faults import Fault

__all__ = ["FakeSettings"]


@dataclass(frozen=True, kw_only=True)
class FakeSettings:
    """Settings of one fake server; ``python -m tests.fake_sglang`` has a flag for each field.

    Attributes:
        model_path: checkpoint folder with ``config.json`` and safetensors, whose names and shapes the server holds.
        host: address to listen on.
        port: port to listen on; 0 for any free port.
        version: the SGLang version to behave like: there is no weight-update session before ``0.5.21``.
        tp_size: number of ranks in a weight group, all in this process.
        api_key: key required for generation and, without ``admin_api_key``, for control calls.
        admin_api_key: key required for control calls instead of ``api_key``.
        enable_lora: whether adapters can be loaded.
        health_generates: ``/health`` generates a token like a default SGLang, so it answers 503 while paused. ``False``
            is what ``SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=0`` does: 200 as long as the process runs.
        step_s: seconds that one decoding step of the whole batch takes; 0 for no delay.
        keep_alive_s: an idle connection is closed after this many seconds, as uvicorn does.
        abort_poll_s: how often an ``abort`` pause checks whether all requests have ended (SGLang: 1 second).
        health_timeout_s: how long a generating ``/health`` waits before it answers 503 (SGLang: 20 seconds).
        collective_timeout_s: how long a rank waits in a collective or at a store (SGLang: torch's default, 30 minutes).
        max_total_tokens: reported size of the KV cache, in tokens.
        seed: seed of sampling at temperature > 0.
        weight_version: weight version at the start.
        preferred_sampling_params: JSON of sampling parameters that are filled in where a request leaves them out.
        incremental_streaming_output: an event of a stream has only what is new, instead of everything so far.
        stream_interval: tokens between two events of a stream.
        lethal_id: the server ends on a prompt with this token id, as SGLang does on requests that it can't decode.
        lethal_new_tokens: but only if at least this many new tokens are requested.
        is_found: whether a trainer on this host finds the server's scheduler, as it finds SGLang's.
        faults: faults armed from the start.
    """

    model_path: str | Path
    host: str = "127.0.0.1"
    port: int = 0
    version: str = "0.5.23"
    tp_size: int = 1
    api_key: str | None = field(default=None, repr=False)
    admin_api_key: str | None = field(default=None, repr=False)
    enable_lora: bool = False
    health_generates: bool = False
    step_s: float = 0.002
    keep_alive_s: float = 5.0
    abort_poll_s: float = 0.05
    health_timeout_s: float = 20.0
    collective_timeout_s: float = 1800.0
    max_total_tokens: int = 8192
    seed: int = 0
    weight_version: str = "default"
    preferred_sampling_params: str | None = None
    incremental_streaming_output: bool = False
    stream_interval: int = 1
    lethal_id: int = -1
    lethal_new_tokens: int = 0
    is_found: bool = False
    faults: tuple[Fault, ...] = ()

    @property
    def has_session(self) -> bool:
        """Whether this version has ``/begin_weight_update`` (from 0.5.21 on)."""
        return tuple(int(part) for part in self.version.split(".")[:3]) >= (0, 5, 21)
