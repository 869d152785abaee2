"""Settings of the HTTP client: keys, time-outs, limits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from torchrl_sglang.config.api_keys import check_keys
from torchrl_sglang.config.checking import names_checked, require_numbers

__all__ = ["ClientConfig"]

_GENERATE_TIMEOUT_S = 1800.0
_SECONDS_PER_TOKEN = 0.25
"""Slower than this no sequence is generated, waiting for others included, unless something is wrong."""


@names_checked()
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Settings of the HTTP client of a server."""

    api_key: str | None = field(default=None, repr=False)
    """The server's ``--api-key``; sent with every request."""
    api_key_file: str | Path | None = field(default=None, repr=False)
    """File with ``api_key``, read when this record is made; the record then holds the key."""
    admin_api_key: str | None = field(default=None, repr=False)
    """The server's ``--admin-api-key``; sent with control calls (pause, update, flush...) instead of ``api_key``."""
    admin_api_key_file: str | Path | None = field(default=None, repr=False)
    """File with ``admin_api_key``."""
    ca_certificate: str | None = None
    """PEM file with a private authority's certificate, for ``https://`` servers; ``None`` trusts the public ones."""
    connect_timeout_s: float = 5.0
    """To open a connection. A running server accepts at once, even under load."""
    probe_timeout_s: float = 10.0
    """For requests that don't use the model (``/ready``, ``/model_info``); long enough for a busy machine."""
    control_timeout_s: float = 60.0
    """For pause, flush and process-group calls, which wait for the scheduler's next step."""
    generate_timeout_s: float | None = None
    """For one request of generations, which is answered when its slowest sequence has ended; for streams the longest
    time between two events. ``None`` is 1,800 s, or 0.25 s per token that may be generated where that is longer."""
    update_timeout_s: float = 300.0
    """For each step of a weight update but the buckets: begin and end of the session, loading a checkpoint from disk,
    verification. The update's deadline may be earlier. For a bucket see :attr:`SyncConfig.bucket_timeout_s`."""
    max_connections: int = 1024
    """Most generate requests under way per server, each on a connection of its own; further threads wait, and the wait
    counts towards their time-out. A process needs as many file descriptors (``ulimit -n``)."""
    connect_retries: int = 2
    """How often a request that did not reach the server is retried."""
    unchecked_vocab: bool = False
    """Allow generation when the vocabulary size is unknown. Refused by default: an unknown id crashes a server."""
    vocab_size: int | None = None
    """Number of valid token ids, for servers whose checkpoint can't be read on this machine."""

    def __post_init__(self) -> None:
        require_numbers(self, *(f.name for f in fields(self) if f.name.endswith("_timeout_s")), above=0)
        require_numbers(self, "max_connections", "vocab_size", at_least=1)
        require_numbers(self, "connect_retries", at_least=0)
        check_keys(self)

    def generate_limit_s(self, max_new_tokens: int = 0) -> float:
        """Longest time for a request of generations, in seconds.

        Args:
            max_new_tokens: tokens that each sequence may get.

        Examples:
            >>> ClientConfig().generate_limit_s(32768), ClientConfig(generate_timeout_s=60).generate_limit_s(32768)
            (8192.0, 60)
        """
        if self.generate_timeout_s is not None:
            return self.generate_timeout_s
        return max(_GENERATE_TIMEOUT_S, _SECONDS_PER_TOKEN * max_new_tokens)
