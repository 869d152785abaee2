"""Servers behind ``https://``: which certificates to trust, and what a failed TLS handshake means."""

from __future__ import annotations

import ssl
from pathlib import Path

from torchrl_sglang.errors import ConfigError, ServerUnreachableError

__all__ = ["explain_tls", "trusted_authorities"]

# OpenSSL's reasons during the handshake. Other reasons can come later, when the request may have run.
_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}
_NO_AGREEMENT = {"UNSUPPORTED_PROTOCOL", "SSLV3_ALERT_HANDSHAKE_FAILURE", "TLSV1_ALERT_PROTOCOL_VERSION"}


def trusted_authorities(ca_certificate: str | None) -> str | bool:
    """The value for ``verify`` of ``requests``.

    Args:
        ca_certificate: PEM file of a private authority (or several in one file); ``None`` trusts the public ones.

    Raises:
        ConfigError: the file can't be read, or holds no certificate.
    """
    if ca_certificate is None:
        return True
    path = Path(ca_certificate).expanduser()
    try:
        ssl.create_default_context(cafile=str(path))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"ca_certificate={ca_certificate!r} can't be used ({error}): it must be a PEM file with the certificate of "
            "the authority that signed the server's"
        ) from error
    return str(path)


def explain_tls(error: BaseException, url: str) -> ServerUnreachableError | None:
    """The error for a failed handshake, before which nothing was sent; ``None`` if the failure may have come later.

    Args:
        error: what was raised, with its causes.
        url: base URL of the server.
    """
    inner = _innermost_tls_error(error)
    if isinstance(inner, ssl.SSLCertVerificationError):
        what = inner.verify_message or str(inner)
        return ServerUnreachableError(
            f"the certificate of {url} is not trusted: {what}. Nothing was sent. For a private authority pass its "
            "certificate as ca_certificate=...; the name in the URL must be one the certificate was made for",
            server=url,
        )
    if inner is not None and inner.reason in _NO_TLS:
        return ServerUnreachableError(f"{url} does not speak TLS; is it http:// there?", server=url)
    if inner is not None and inner.reason in _NO_AGREEMENT:
        return ServerUnreachableError(f"{url} and this machine's OpenSSL share no TLS version ({inner})", server=url)
    return None


def _innermost_tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """The innermost ``SSLError``, which urllib3 and requests wrap in the arguments or ``reason`` of their errors."""
    pending: list[object] = [error]
    found: ssl.SSLError | None = None
    while pending:
        each = pending.pop()
        if isinstance(each, ssl.SSLError):
            found = each
        if isinstance(each, BaseException):
            pending += [getattr(each, "reason", None), *each.args]
    return found
