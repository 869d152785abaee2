"""Reads the JSON body of a request, up to a largest size."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from torchrl_sglang.agents.http.api_errors import ApiError, bad_request

__all__ = ["ClientDisconnect", "parse_json", "read_json_body"]

_DEEPEST = 100
"""Levels of nesting: what is recorded is copied and written by recursive functions later."""


async def read_json_body(request: Request, *, max_bytes: int) -> Any:
    """The parsed body; ``None`` if it is empty.

    Args:
        request: the request.
        max_bytes: a longer body is refused, before it is in memory.

    Raises:
        ApiError: 413 for a longer body, 415 for a compressed one, 400 for one that is no JSON.
        ClientDisconnect: the client closed the connection.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(
            415,
            f"the body is compressed ({encoding!r:.40}): send it as it is",
            param="content-encoding",
            code="unsupported_encoding",
        )
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    chunks, size, is_whole = [], 0, False
    while not is_whole:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
        is_whole = not message.get("more_body", False)
    return parse_json(b"".join(chunks))


def parse_json(body: bytes) -> Any:
    r"""JSON as Python objects; ``None`` for an empty body.

    Raises:
        ApiError: not JSON, not UTF-8, nested too deeply, NaN or infinity, or half of a surrogate pair in a string.

    Examples:
        >>> parse_json(b'{"temperature": NaN}')
        Traceback (most recent call last):
        ...
        torchrl_sglang.agents.http.api_errors.ApiError: the body is not valid JSON: NaN is no JSON number
    """
    if not body.strip():
        return None
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        if b"\\ud" in body or b"\\uD" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad_request("a string of the body holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # not JSON, not UTF-8, or an integer of thousands of digits
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if _is_deeper_than(value, _DEEPEST):
        raise bad_request(f"the body is nested more than {_DEEPEST} levels deep", code="invalid_json")
    return value


def _is_deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        inner = [each for each in level if isinstance(each, (dict, list))]
        level = [each for one in inner for each in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {max_bytes:,} bytes: shorten the conversation, or start the gateway with a larger "
        "max_body_bytes",
        code="request_too_large",
    )
