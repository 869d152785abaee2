"""Who may do what: the key of a request, and the addresses from which sessions are made without one."""

from __future__ import annotations

import hmac
import ipaddress

from starlette.requests import Request

from torchrl_sglang.agents.http.api_errors import ApiError

__all__ = ["check_admin", "is_loopback", "key_of"]


def key_of(request: Request) -> str:
    """The key of a request, as OpenAI's clients send it, or as Anthropic's do; empty if there is none."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return request.headers.get("x-api-key", "").strip()


def check_admin(request: Request, admin_key: str | None) -> None:
    """Refuse a request to make a session without the gateway's key.

    A gateway without a key listens on this machine only. There it refuses requests to other names than this machine's:
    a web page that the user visits could give its own name this machine's address.

    Raises:
        ApiError: 401, or 403 for another name.
    """
    if admin_key is not None:
        if not hmac.compare_digest(key_of(request).encode(), admin_key.encode()):
            raise ApiError(
                401,
                "sessions are made with the gateway's own key: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
        return
    host = request.url.hostname or ""
    if not is_loopback(host):
        raise ApiError(
            403,
            f"this gateway has no key, so it makes sessions only for requests to 127.0.0.1 or localhost, not to "
            f"{host!r}: start it with a key",
            code="wrong_host",
        )


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own.

    Examples:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, True, False)
    """
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
