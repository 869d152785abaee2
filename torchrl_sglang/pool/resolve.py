"""What users pass as servers (an engine, a pool, a URL or several), as a pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
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
    urls = [str(servers)] if isinstance(servers, (str, Path)) else servers
    if isinstance(urls, (list, tuple)) and urls and all(isinstance(url, str) for url in urls):
        return SGLangPool([SGLangClient(url, client) for url in urls])
    pool: Any = getattr(servers, "pool", servers)
    hint = _about_other_generators(servers)
    if hint or not callable(getattr(pool, "generate", None)):
        raise ConfigError(f"servers must be an AsyncSGLang, an SGLangPool or URLs, got {type(servers).__name__}{hint}")
    if client is not None:
        raise ConfigError("client= sets time-outs and keys for URLs; this pool has its own settings")
    resolved: SGLangPool = pool
    return resolved


def _about_other_generators(servers: Any) -> str:
    """What to do with an object that generates, but not on SGLang servers of this package; empty for other objects."""
    home = type(servers).__module__.split(".")[0]
    if callable(getattr(servers, "parameters", None)):
        return (
            ". A model itself generates in TransformersWrapper; to generate with SGLang, launch servers from its "
            "checkpoint, AsyncSGLang.from_pretrained(path), and send them its weights, servers.update_weights(model)"
        )
    if home == "vllm" or type(servers).__name__ == "AsyncVLLM":
        return " of vLLM: launch SGLang servers instead, AsyncSGLang.from_pretrained(model)"
    if home == "torchrl":
        return f" of torchrl: use this package's, AsyncSGLang.connect({getattr(servers, 'server_url', 'url')!r})"
    return ""
