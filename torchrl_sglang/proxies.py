"""Recognises answers of proxies and ingresses that stand before a server, and says what to do about them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from torchrl_sglang.errors import ProtocolError
from torchrl_sglang.protocol.messages import HttpRequest

__all__ = ["explain_proxy", "page_title", "refuse_web_page", "retry_after_s"]

_PAGE = re.compile(
    r"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
_TITLE = re.compile(r"<(title|h1)[^>]*>(.*?)</\1>", re.IGNORECASE | re.DOTALL)

_NEVER_SGLANGS = (502, 504)
_ADVICE = {
    408: "its time to receive a request is too short for this one: raise it, or send fewer prompts at once",
    413: "it takes no request of this size: raise its limit (nginx: client_max_body_size), or send fewer prompts",
    429: "it limits the rate of requests: raise its limit, or send fewer at once",
    502: "the server behind it is gone, or is being restarted",
    503: "there is no server behind it that it would send requests to",
    504: "the server behind it took longer than it waits: its time-out for reading (nginx: proxy_read_timeout) must be "
    "longer than the longest generation or weight update",
}


def page_title(body: str) -> str | None:
    """The title of a web page, ``""`` if it has none; ``None`` if this is no web page.

    Examples:
        >>> page_title("<html><head><title>502 Bad Gateway</title></head></html>"), page_title('{"text": "<html>"}')
        ('502 Bad Gateway', None)
    """
    if _PAGE.match(body) is None:
        return None
    found = _TITLE.search(body)
    return "" if found is None else " ".join(found.group(2).split())[:200]


def refuse_web_page(request: HttpRequest, *, url: str, body: str) -> None:
    """Require that a successful answer is none of something else: of a login page, a maintenance page, a wrong server.

    Args:
        request: what was sent.
        url: base URL of the server.
        body: the answer, or its beginning.

    Raises:
        ProtocolError: it is a web page. SGLang answers no request of this package with one.
    """
    title = page_title(body)
    if title is not None:
        raise ProtocolError(
            f"{url} answered {request.path} with a web page ({title or body[:80]!r}): not SGLang has answered, but a "
            "proxy, a login page or another web server. Is the URL right, and open to this machine?",
            server=url,
        )


def explain_proxy(status: int, body: str, headers: Mapping[str, Any]) -> str | None:
    """What a refusal means that a proxy has answered; ``None`` if it may be SGLang's own.

    Args:
        status: the HTTP status.
        body: the answer.
        headers: its headers; the names in any case.

    Examples:
        >>> explain_proxy(503, '{"error": {"message": "The request queue is full."}}', {}) is None
        True
        >>> explain_proxy(301, "", {"location": "https://a.example/generate"})
        'it leads to https://a.example/generate: connect to the address there'
    """
    if 300 <= status < 400:
        location = _header(headers, "location")
        return (
            "SGLang answers no request so" if not location else f"it leads to {location}: connect to the address there"
        )
    if status not in _ADVICE or not (status in _NEVER_SGLANGS or (body.strip() and not _is_json(body))):
        return None
    return f"this is the answer of a proxy or an ingress before the server: {_ADVICE[status]}"


def retry_after_s(status: int, headers: Mapping[str, Any]) -> float | None:
    """After how many seconds a refused request may be sent again, as the answer says; ``None`` if it says nothing.

    A date is read as an interval after the answer's own date: the two clocks may differ.

    Examples:
        >>> retry_after_s(429, {"Retry-After": "2"}), retry_after_s(400, {"Retry-After": "2"})
        (2.0, None)
        >>> sent, later = "Wed, 21 Oct 2026 07:28:00 GMT", "Wed, 21 Oct 2026 07:28:30 GMT"
        >>> retry_after_s(503, {"Retry-After": later, "Date": sent})
        30.0
    """
    said = _header(headers, "retry-after")
    if status not in (429, 503) or said is None:
        return None
    if re.fullmatch(r"\d{1,9}", said):
        return float(said)
    try:
        wait = parsedate_to_datetime(said) - parsedate_to_datetime(_header(headers, "date") or "")
    except (TypeError, ValueError):
        return None
    return max(0.0, wait.total_seconds())


def _header(headers: Mapping[str, Any], name: str) -> str | None:
    return next((str(value).strip() for key, value in headers.items() if key.lower() == name), None)


def _is_json(body: str) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False
    return True
