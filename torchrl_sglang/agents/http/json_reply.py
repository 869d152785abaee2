"""``JsonReply``: an answer in JSON."""

from __future__ import annotations

import json
from typing import Any

import orjson
from starlette.responses import JSONResponse

__all__ = ["JsonReply", "json_bytes"]


class JsonReply(JSONResponse):
    """An answer in JSON, written by orjson: answers with log-probs are long."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json_bytes(content)


def json_bytes(value: Any) -> bytes:
    """A value as compact JSON in UTF-8.

    Examples:
        >>> json_bytes({"seed": 2**80})
        b'{"seed":1208925819614629174706176}'
    """
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer of more than 64 bits, which a client may have sent
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
