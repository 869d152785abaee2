"""The fields of a request that say how tokens are sampled, as arguments of ``SamplingParams``."""

from __future__ import annotations

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
    given: dict[str, Any] = {name: fields.number(name) for name in (*_NUMBERS, *_MORE_NUMBERS)}
    given["n"] = fields.integer("n", at_least=1, at_most=_MOST_CHOICES)
    given["seed"] = fields.integer("seed")
    given.update({name: fields.integer(name, at_most=MOST_INTEGER) for name in _MORE_INTEGERS})
    given.update({name: fields.text(name) for name in _GRAMMARS})
    given["ignore_eos"] = fields.flag("ignore_eos")
    given["stop"] = _read_stop(fields)
    given["stop_token_ids"] = _read_ids(fields)
    bias = fields.object("logit_bias")
    given["logit_bias"] = bias or None
    return {name: value for name, value in given.items() if value is not None}


def _read_stop(fields: Fields) -> list[str] | None:
    stop = fields.any("stop")
    given = [stop] if isinstance(stop, str) else stop
    if given is None or given == []:
        return None
    if not isinstance(given, list) or not all(isinstance(each, str) and each for each in given):
        raise bad_request(
            f"{fields.path('stop')} must be a non-empty string or a list of them, got {stop!r:.100}", "stop"
        )
    return given


def _read_ids(fields: Fields) -> list[int] | None:
    ids = fields.list("stop_token_ids")
    if ids and not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise bad_request(f"{fields.path('stop_token_ids')} must be token ids, got {ids!r:.100}", "stop_token_ids")
    return ids or None


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
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
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
