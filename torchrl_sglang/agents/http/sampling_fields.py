"""The fields of a request that say how tokens are sampled, as arguments of ``SamplingParams``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchrl_sglang.agents.http.api_errors import bad_request
from torchrl_sglang.agents.http.fields import Fields

__all__ = ["MOST_INTEGER", "MOST_TOP_LOGPROBS", "read_grammar", "read_sampling"]

MOST_TOP_LOGPROBS = 20
"""As in OpenAI's API."""
MOST_INTEGER = 2**31 - 1
"""What a server's tensors hold: a larger number ends its process."""
_MOST_CHOICES = 128
_NUMBERS = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
# Not OpenAI's: what vLLM and SGLang take, which clients send in `extra_body`.
_MORE_NUMBERS = ("min_p", "repetition_penalty")
_MORE_INTEGERS = ("top_k", "min_tokens")
_GRAMMARS = ("regex", "ebnf")


def read_sampling(fields: Fields) -> dict[str, Any]:
    """The settings that were given, in names that :meth:`SamplingParams.from_kwargs` takes; it checks their ranges.

    Raises:
        ApiError: a value of the wrong type.
    """
    return {
        name: value for name in fields.given(tuple(_READERS)) if (value := _READERS[name](fields, name)) is not None
    }


def _read_stop(fields: Fields, name: str) -> list[str] | None:
    stop = fields.any(name)
    given = [stop] if isinstance(stop, str) else stop
    if given == []:
        return None
    if not isinstance(given, list) or not all(isinstance(each, str) and each for each in given):
        raise bad_request(f"{fields.path(name)} must be a non-empty string or a list of them, got {stop!r:.100}", name)
    return given


def _read_ids(fields: Fields, name: str) -> list[int] | None:
    ids = fields.list(name)
    if ids and not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise bad_request(f"{fields.path(name)} must be token ids, got {ids!r:.100}", name)
    return ids or None


# What reads each field, if it is given.
_READERS: dict[str, Callable[[Fields, str], Any]] = {
    **dict.fromkeys((*_NUMBERS, *_MORE_NUMBERS), Fields.number),
    "n": lambda fields, name: fields.integer(name, at_least=1, at_most=_MOST_CHOICES),
    "seed": Fields.integer,
    **dict.fromkeys(_MORE_INTEGERS, lambda fields, name: fields.integer(name, at_most=MOST_INTEGER)),
    **dict.fromkeys(_GRAMMARS, Fields.text),
    "ignore_eos": Fields.flag,
    **dict.fromkeys(("stop", "stop_regex"), _read_stop),
    "stop_token_ids": _read_ids,
    "logit_bias": lambda fields, name: fields.object(name) or None,
}


def read_grammar(fields: Fields) -> dict[str, Any]:
    """The grammar that ``response_format`` asks for, as an argument of ``SamplingParams``; empty for free text.

    Args:
        fields: of ``response_format``, or of the Responses API's ``text.format``, which has the schema's fields itself.

    Raises:
        ApiError: an unknown type, or no schema.

    Examples:
        >>> read_grammar(Fields({"type": "json_object"}))
        {'json_schema': {'type': 'object'}}
    """
    kind = fields.text("type", choices=("text", "json_object", "json_schema"), required=True)
    if kind == "text":
        return {}
    if kind == "json_object":  # some servers take a schema with it
        return {"json_schema": fields.object("schema") or {"type": "object"}}
    inner = fields.object("json_schema")
    holder = fields if inner is None else Fields(inner, fields.path("json_schema"))
    for name in ("name", "description"):
        holder.text(name)
    holder.flag("strict")
    schema = holder.object("schema")
    if schema is None:
        path = holder.path("schema") if inner is not None else fields.path("json_schema")
        raise bad_request(f"{path} is missing: give the JSON schema", path, "missing_required_parameter")
    return {"json_schema": schema}
