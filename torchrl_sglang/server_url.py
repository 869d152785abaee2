"""Reads the address of a server, and says what is wrong with one that can't be right."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from torchrl_sglang.errors import ConfigError

__all__ = ["base_url", "resolved_addresses", "unresolvable_host", "url_list"]

_ENDPOINTS = re.compile(
    r"/(v1(/.*)?|generate|health(_generate)?|ready|model_info|get_model_info|server_info|get_server_info|docs|metrics)$"
)
_EXAMPLE = "'http://127.0.0.1:30000'"


def base_url(url: Any) -> str:
    """The base URL of a server as its client uses it.

    Args:
        url: what the user gave; ``"host:port"`` is taken as ``http``.

    Raises:
        ConfigError: it is no URL of a server: the name of a model, the path of an API, a URL with a key in it...

    Examples:
        >>> base_url("0.0.0.0:30000/")
        'http://127.0.0.1:30000'
        >>> base_url("http://host:30000/v1")
        Traceback (most recent call last):
            ...
        torchrl_sglang.errors.ConfigError: 'http://host:30000/v1' ends in /v1, which is the path of one of the server's
        APIs; the server itself is 'http://host:30000'
    """
    if not isinstance(url, str) or not url.strip():
        raise ConfigError(f"the URL of a server must be a string such as {_EXAMPLE}, got {url!r}")
    url = url.strip()
    if _is_model(url):
        raise ConfigError(
            f"{url!r} looks like the name or folder of a model, not like a server's URL. To launch a server for it: "
            f'AsyncSGLang.from_pretrained("{url}"). To use a running one, give its URL, such as {_EXAMPLE}'
        )
    parts = _split(url if "//" in url else f"http://{url}")
    if parts is None:
        raise ConfigError(f"{_shown(url)} is not the URL of a server; expected something like {_EXAMPLE}")
    if "@" in parts.netloc:
        raise ConfigError(
            f"{_shown(url)}: a URL must not hold a name or a key, since it appears in logs and errors: pass the key as "
            "api_key="
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"{url!r} has a query or a fragment; the server itself is {_joined(parts, parts.path)!r}")
    path = parts.path.rstrip("/")
    if endpoint := _ENDPOINTS.search(path):
        base = _joined(parts, path[: endpoint.start()])
        raise ConfigError(
            f"{url!r} ends in {endpoint.group()}, which is the path of one of the server's APIs; the server itself is "
            f"{base!r}"
        )
    return _joined(parts, path)


def url_list(urls: Any) -> list[Any]:
    """The URLs of servers that were given as one string, or as several in any iterable.

    Raises:
        ConfigError: it is neither.

    Examples:
        >>> url_list("http://a:30000"), url_list(("http://a:30000", "http://b:30000"))
        (['http://a:30000'], ['http://a:30000', 'http://b:30000'])
    """
    if isinstance(urls, str):
        return [urls]
    if isinstance(urls, Iterable) and not isinstance(urls, (bytes, bytearray)):
        return list(urls)
    raise ConfigError(f"servers are named by a URL such as {_EXAMPLE}, or several, got {urls!r}")


def resolved_addresses(url: str) -> frozenset[tuple[str, int]]:
    """The network addresses and ports that a base URL stands for; none if its host is unknown.

    Examples:
        >>> resolved_addresses("http://127.0.0.1:30000")
        frozenset({('127.0.0.1', 30000)})
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: a part of the name is empty or too long
        return frozenset()
    return frozenset((str(address[0]), port) for *_, address in found)


def unresolvable_host(url: str) -> str:
    """The error text for a host that no name server knows."""
    host = re.sub(r":\d+$", "", urlsplit(url).netloc)  # as it was given; .hostname would be in lower case
    text = f"the host {host!r} is unknown: its name can't be resolved. Check its spelling and this machine's DNS."
    if "." not in host:
        text += f' If {host!r} is a model, launch a server for it: AsyncSGLang.from_pretrained("{host}")'
    return text


def _is_model(text: str) -> bool:
    """Whether this is a folder, or a hub name such as ``Qwen/Qwen3-0.6B``, rather than an address."""
    if "//" in text:
        return False
    if text.startswith(("/", "./", "../", "~")):
        return True
    head, slash, _ = text.partition("/")
    if slash and ":" not in head and head != "localhost" and not re.fullmatch(r"[0-9.]+|\[.*\]", head):
        return True
    return ":" not in text and (Path(text) / "config.json").is_file()


def _split(full: str) -> SplitResult | None:
    if not full.isprintable() or " " in full:
        return None
    try:
        parts = urlsplit(full)
        _ = parts.port  # raises if it is no number
        (parts.hostname or "").encode("idna")  # raises if a part of the name is empty or too long
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname else None


def _joined(parts: SplitResult, path: str) -> str:
    netloc = parts.netloc
    if parts.hostname in ("0.0.0.0", "::"):  # an address to listen on, not one to connect to
        loopback = "127.0.0.1" if parts.hostname == "0.0.0.0" else "[::1]"
        netloc = loopback + (f":{parts.port}" if parts.port else "")
    return f"{parts.scheme}://{netloc}{path.rstrip('/')}"


def _shown(url: str) -> str:
    """A URL for an error, without a key."""
    return repr(re.sub(r"//[^/]*@", "//...@", url))
