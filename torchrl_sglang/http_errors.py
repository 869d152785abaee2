"""Translates failed HTTP calls, from ``requests``' exceptions and from HTTP statuses, into this package's errors."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from torchrl_sglang.errors import (
    ProtocolError,
    RequestRejectedError,
    ServerLostError,
    ServerTimeoutError,
    ServerUnreachableError,
    SGLangError,
)
from torchrl_sglang.protocol.messages import HttpRequest
from torchrl_sglang.proxies import explain_proxy, page_title, retry_after_s
from torchrl_sglang.server_url import unresolvable_host
from torchrl_sglang.tls import explain_tls

__all__ = [
    "may_retry",
    "raise_for_status",
    "refused_for_s",
    "refused_until_cut",
    "rejected",
    "stream_cut_short",
    "translate_error",
]

_EAI_NODATA = getattr(socket, "EAI_NODATA", socket.EAI_NONAME)
_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE}
_LOCAL_ERRNOS = {*_NO_DESCRIPTOR, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.ENETDOWN}
"""No descriptor, no memory, no free local port, no network."""


def may_retry(request: HttpRequest, error: Exception) -> bool:
    """The retry rule: a request is sent again only if it cannot have run, or only reads."""
    if isinstance(error, ServerUnreachableError):
        return True
    return request.repeatable and isinstance(error, ServerLostError)


def refused_for_s(request: HttpRequest, response: requests.Response) -> float | None:
    """The retry rule for answers: after how many seconds a refused request may be sent again; ``None`` if it may not.

    What got 429 has not run. A proxy may answer 503 after its server has taken the request (Varnish's page, which says
    ``Retry-After`` too): then only what reads is sent again.
    """
    if response.status_code == 503 and not request.repeatable:
        return None
    return retry_after_s(response.status_code, response.headers)


def refused_until_cut(request: HttpRequest, *, url: str, status: int) -> ServerUnreachableError:
    """The error for a request that waited after its refusal until its connections were cut."""
    return ServerUnreachableError(
        f"{url} answered {status} to {request.path}, and has left the pool before it could be sent again",
        server=url,
    )


def translate_error(error: requests.RequestException, request: HttpRequest, *, url: str, wait_s: float) -> SGLangError:
    """This package's error for a request that got no answer.

    Args:
        error: what ``requests`` raised.
        request: what was sent.
        url: base URL of the server.
        wait_s: how long the client waited for the answer.
    """
    where = f"{url}{request.path}"
    reason = getattr(error.args[0], "reason", None) if error.args else None
    if isinstance(error, requests.exceptions.SSLError) and (refusal := explain_tls(error, url)):
        return refusal
    if isinstance(reason, NameResolutionError):
        # A name that does not exist may be that of a host that is gone; any other failure is that of the look-up.
        cause = reason.__cause__
        is_gone = isinstance(cause, socket.gaierror) and cause.errno in (socket.EAI_NONAME, _EAI_NODATA)
        return ServerUnreachableError(unresolvable_host(url), server=url, is_local=not is_gone)
    if local := _local_cause(reason):
        return ServerUnreachableError(
            f"this machine could not open a connection to {url}: {local}", server=url, is_local=True
        )
    if isinstance(error, requests.ConnectTimeout) or isinstance(reason, (NewConnectionError, ConnectTimeoutError)):
        no_port = "" if urlsplit(url).port else " The URL has no port; SGLang's own is 30000."
        return ServerUnreachableError(
            f"nothing accepts connections at {url}; is the server running and the address right?{no_port}", server=url
        )
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return ServerTimeoutError(
            f"{where} did not answer within {wait_s:g} s; the request may still be running "
            f"(ClientConfig.{request.timeout}_timeout_s sets the limit)",
            server=url,
        )
    if isinstance(error, (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError)):
        return ProtocolError(f"{where} sent half a reply: {error}", server=url)
    if isinstance(error, requests.ConnectionError):
        return ServerLostError(
            f"the connection to {where} broke after the request was sent; it may have run, so it is not sent again. "
            "If the server died, its log has the reason",
            server=url,
        )
    return ProtocolError(f"{where}: {error}", server=url)


def _local_cause(reason: object) -> str:
    """What this machine lacked when it tried to connect; empty if the cause is elsewhere."""
    cause = reason.__cause__ if isinstance(reason, NewConnectionError) else None
    if not isinstance(cause, OSError) or cause.errno not in _LOCAL_ERRNOS:
        return ""
    advice = (
        ". Raise the limit of open files (ulimit -n), or send fewer requests at once"
        if cause.errno in _NO_DESCRIPTOR
        else ""
    )
    return f"{cause}{advice}"


def stream_cut_short(request: HttpRequest, *, url: str) -> ServerLostError:
    """The error for a stream without its last event."""
    return ServerLostError(f"{url} ended the stream of {request.path} half-way", server=url)


def raise_for_status(response: requests.Response, request: HttpRequest, *, url: str) -> None:
    """Raise unless the status is a success; a redirect is none.

    Raises:
        RequestRejectedError: with the server's own message.
    """
    if 200 <= response.status_code < 300:
        return
    raise rejected(
        request,
        url=url,
        status=response.status_code,
        body=response.text,
        reason=response.reason,
        has_key="Authorization" in response.request.headers,
        headers=response.headers,
    )


def rejected(
    request: HttpRequest,
    *,
    url: str,
    status: int,
    body: str,
    reason: str,
    has_key: bool,
    headers: Mapping[str, Any] = MappingProxyType({}),
) -> RequestRejectedError:
    """The error for an answer whose status is not a success.

    Args:
        request: what was sent.
        url: base URL of the server.
        status: the HTTP status.
        body: text of the answer.
        reason: the words behind the status, for an answer without a text.
        has_key: whether a key was sent.
        headers: of the answer.
    """
    detail = _detail(body) or reason
    advice = _about_keys(has_key, request) if status in (401, 403) else ""
    explained = explain_proxy(status, body, headers)
    if explained is not None:
        advice = f"; {explained}"
    message = f"{url} answered {status} to {request.path}: {detail}{advice}"
    return RequestRejectedError(
        message,
        server=url,
        status=status,
        detail=detail,
        is_from_proxy=explained is not None,
        retry_after_s=retry_after_s(status, headers),
    )


def _about_keys(was_sent: bool, request: HttpRequest) -> str:
    """What to do about a refused key, or about one that was not sent."""
    if request.timeout in ("control", "update"):
        what = "The key that was sent is not accepted" if was_sent else "No key was sent"
        return f". {what}: this call needs the server's --admin-api-key as admin_api_key= (or its only key as api_key=)"
    if was_sent:
        return ". The key that was sent as api_key= is not the one that the server was started with (--api-key)"
    return ". No key was sent: pass the server's --api-key as api_key=, as in AsyncSGLang.connect(url, api_key=...)"


def _detail(body: str) -> str:
    """The server's message: ``{"error": {"message"}}``, ``{"message"}``, ``{"detail"}``, plain text, a page's title."""
    try:
        value = json.loads(body)
    except ValueError:
        title = page_title(body)
        return body[:500] if title is None else title
    for _ in range(3):
        if not isinstance(value, dict):
            break
        value = next((value[key] for key in ("error", "message", "detail") if value.get(key)), str(value))
    return str(value)[:500]
