"""What users pass as servers (an engine, a pool, a URL or several), as a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool.pool import SGLangPool

__all__ = ["HasPool", "Servers", "resolve_pool"]


class HasPool(Protocol):
    """An engine: an object that owns a pool."""

    @property
    def pool(self) -> SGLangPool:
        """Its servers."""


Servers = SGLangPool | HasPool | str | Sequence[str]
"""What users pass as servers: a pool, an engine, a URL or several."""


def resolve_pool(servers: Servers, client: ClientConfig | None = None) -> SGLangPool:
    """Accept servers in every form in which users have them.

    Args:
        servers: an :class:`~torchrl_sglang.AsyncSGLang` or another object with a ``pool``, an
            :class:`~torchrl_sglang.SGLangPool` or an object that generates like one, a URL, or a list of URLs.
        client: time-outs and keys for URLs. A pool has its own.

    Returns:
        The pool. One made from URLs is not connected yet.

    Raises:
        ConfigError: ``servers`` is none of these, or ``client`` is given for servers that have settings already.

    Examples:
        >>> resolve_pool(["http://a:30000", "http://b:30000"])
        SGLangPool(['http://a:30000', 'http://b:30000'])
    """
    urls = [servers] if isinstance(servers, str) else servers
    if isinstance(urls, (list, tuple)) and urls and all(isinstance(url, str) for url in urls):
        return SGLangPool([SGLangClient(url, client) for url in urls])
    pool: Any = getattr(servers, "pool", servers)
    if not callable(getattr(pool, "generate", None)):
        raise ConfigError(f"servers must be an AsyncSGLang, an SGLangPool or URLs, got {type(servers).__name__}")
    if client is not None:
        raise ConfigError("client= sets time-outs and keys for URLs; this pool has its own settings")
    resolved: SGLangPool = pool
    return resolved
