"""How servers are talked to: keys, time-outs, limits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from torchrl_sglang.config.checking import require, require_positive

__all__ = ["ClientConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How servers are talked to."""

    api_key: str | None = field(default=None, repr=False)
    """The server's ``--api-key``; sent on every call."""
    admin_api_key: str | None = field(default=None, repr=False)
    """The server's ``--admin-api-key``; sent on control calls (pause, update, flush...) in place of ``api_key``."""
    ca_certificate: str | None = None
    """PEM file with a private authority's certificate, for ``https://`` servers; ``None`` trusts the public ones."""
    connect_timeout_s: float = 5.0
    """To open a connection. A server that runs accepts at once, even under load."""
    probe_timeout_s: float = 10.0
    """For answers that touch no model (`/ready`, `/model_info`); long enough for a busy machine."""
    control_timeout_s: float = 60.0
    """For pause, flush and group calls, which wait for the scheduler to come round."""
    generate_timeout_s: float = 1800.0
    """For one batch of generations; the whole batch is one request, so this bounds the slowest sequence."""
    update_timeout_s: float = 300.0
    """For each other step of a weight update: opening and closing the session, loading a checkpoint from disk, the
    proof. The update's own deadline ends it earlier. A bucket has :attr:`SyncConfig.bucket_timeout_s`."""
    max_connections: int = 32
    """Most connections kept open per server; more threads than this wait for a free one."""
    connect_retries: int = 2
    """How often a request that never reached the server is sent again."""
    unchecked_vocab: bool = False
    """Allow generation though the vocabulary size is unknown. An unknown id kills a server, so the default refuses."""
    vocab_size: int | None = None
    """Number of valid token ids, for servers whose checkpoint path can't be read from here."""

    def __post_init__(self) -> None:
        require_positive(self, *(f.name for f in fields(self) if f.name.endswith("_timeout_s")))
        require(self.max_connections >= 1, f"max_connections must be at least 1, got {self.max_connections}")
        require(self.connect_retries >= 0, f"connect_retries must be at least 0, got {self.connect_retries}")
        require(self.vocab_size is None or self.vocab_size > 0, f"vocab_size must be positive, got {self.vocab_size}")
