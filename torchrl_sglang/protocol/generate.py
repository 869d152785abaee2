"""``/generate``: token ids in, :class:`GenerateReply` out.

Shapes: ``ids_B_T`` is a list of ``B`` prompts of differing lengths ``T``; replies come prompt-major, ``n`` per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ProtocolError
from torchrl_sglang.protocol.media import Media, media_fields
from torchrl_sglang.protocol.messages import GenerateReply, HttpRequest, WeightSpan
from torchrl_sglang.protocol.version import version_number

__all__ = ["build_generate", "parse_generate", "parse_one", "token_versions"]


def build_generate(
    ids_B_T: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    return_logprobs: bool = True,
    prompt_logprobs: bool = False,
    stream: bool = False,
    request_ids: Sequence[str] | None = None,
    lora: str | None = None,
    cache_salt: str | None = None,
    media: Sequence[Media] | None = None,
) -> HttpRequest:
    """One request for the whole batch, so that the server's continuous batching sees all prompts at once.

    Args:
        ids_B_T: prompt token ids.
        sampling: how tokens are drawn; ``sampling.n`` sequences per prompt.
        return_logprobs: return the log-prob of every response token.
        prompt_logprobs: return the log-prob of every prompt token too. The server then recomputes the whole prompt:
            it can't use its prefix cache.
        stream: answer with server-sent events.
        request_ids: one id per prompt, for :func:`~.control.build_abort`; not possible with ``n > 1``.
        lora: name of a loaded adapter.
        cache_salt: name-space in the prefix cache: only requests with the same salt share prefixes.
        media: images, videos and sounds of each prompt. In the ids each has the *one* placeholder that the chat
            template writes; the server expands it to the item's number of tokens.

    Examples:
        >>> request = build_generate([[1, 2], [3]], SamplingParams(max_new_tokens=4))
        >>> request.path, request.body["input_ids"], request.repeatable
        ('/generate', [[1, 2], [3]], False)
    """
    body: dict[str, Any] = {
        "input_ids": [list(ids_T) for ids_T in ids_B_T],
        "sampling_params": sampling.to_wire(),
        "return_logprob": return_logprobs or prompt_logprobs,
    }
    if sampling.sampling_mask:
        body["return_sampling_mask"] = True
    if prompt_logprobs:
        body["logprob_start_len"] = 0  # the default, -1, reports response tokens only
    if stream:
        body["stream"] = True
    if request_ids is not None:
        body["rid"] = list(request_ids)
    if lora is not None:
        body["lora_path"] = lora  # a loaded adapter's name, despite the field's name
    if cache_salt is not None:
        body["extra_key"] = cache_salt
    if media is not None:
        body.update(media_fields(media))
    return HttpRequest(method="POST", path="/generate", body=body, timeout="generate")


def parse_generate(
    answer: Any, *, num_expected: int, server: str, return_logprobs: bool = True, prompt_logprobs: bool = False
) -> list[GenerateReply]:
    """Read the answer to :func:`build_generate`.

    Raises:
        ProtocolError: the answer is not a list of ``num_expected`` well-formed replies.
    """
    items = answer if isinstance(answer, list) else [answer]
    if len(items) != num_expected:
        raise ProtocolError(
            f"{server} answered {len(items)} sequences where {num_expected} were requested; none is used",
            server=server,
        )
    return [
        parse_one(item, server=server, return_logprobs=return_logprobs, prompt_logprobs=prompt_logprobs)
        for item in items
    ]


def parse_one(item: Any, *, server: str, return_logprobs: bool = True, prompt_logprobs: bool = False) -> GenerateReply:
    """Read one sequence of an answer, or one (cumulative) event of a stream.

    Raises:
        ProtocolError: a field is missing or of another type, there are not as many log-probs as token ids, or the
            weight versions do not cover the tokens.
    """
    try:
        reply = _parse(item, server, return_logprobs, prompt_logprobs)
    except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        raise ProtocolError(
            f"{server} answered /generate without the field {error}: not the reply SGLang promises", server=server
        ) from error
    num_tokens = len(reply.output_ids)
    if reply.output_logprobs is not None and len(reply.output_logprobs) != num_tokens:
        raise ProtocolError(
            f"{server} answered {len(reply.output_logprobs)} log-probs for {num_tokens} tokens", server=server
        )
    if reply.support_ids is not None and not (
        len(reply.support_ids) == len(reply.support_logprobs or ()) == num_tokens
    ):
        raise ProtocolError(
            f"{server} answered {len(reply.support_ids)} sampling masks for {num_tokens} tokens", server=server
        )
    return reply


def _parse(item: Any, server: str, return_logprobs: bool, prompt_logprobs: bool) -> GenerateReply:
    ids_T = _ids(item["output_ids"])
    meta = _mapping("meta_info", item["meta_info"])
    finish = _mapping("finish_reason", meta["finish_reason"] or {})
    kind = finish.get("type", "length")
    if kind not in ("stop", "length", "abort"):
        raise ValueError("finish_reason.type")
    logprobs_T = _logprobs([entry[0] for entry in meta["output_token_logprobs"]]) if return_logprobs else None
    if logprobs_T is not None and not ids_T:
        # For max_new_tokens=0 beside running requests, SGLang (0.5.23) may return the log-prob of a discarded token.
        logprobs_T = []
    support_R_K = meta.get("output_token_sampling_mask")
    return GenerateReply(
        output_ids=ids_T,
        output_logprobs=logprobs_T,
        support_ids=None if support_R_K is None else [_ids(support_K) for support_K in support_R_K],
        support_logprobs=None if support_R_K is None else _logprobs(meta["output_token_sampling_logprobs"]),
        prompt_logprobs=_prompt_logprobs(meta["input_token_logprobs"]) if prompt_logprobs else None,
        text=_text(item.get("text")),
        finish_reason=kind,
        matched=finish.get("matched"),
        abort_message=str(finish.get("message", "")) if kind == "abort" else "",
        prompt_tokens=int(meta.get("prompt_tokens") or 0),
        completion_tokens=int(meta.get("completion_tokens", len(ids_T))),
        cached_tokens=int(meta.get("cached_tokens") or 0),
        weight_version=_weight_version(meta),
        weight_spans=_weight_spans(meta, len(ids_T)),
        request_id=str(meta.get("id", "")),
        latency_s=float(meta.get("e2e_latency") or 0.0),
        server=server,
    )


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(name)
    return value


def _ids(values: Any) -> list[int]:
    """Token ids, which a tensor can hold."""
    if not isinstance(values, list) or not {int}.issuperset(map(type, values)):
        raise TypeError("output_ids")
    if values and (min(values) < 0 or max(values) >= 2**31):
        raise ValueError("output_ids")
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str | None):
        raise TypeError("text")
    return value or ""


def _logprobs(values: Sequence[float | None]) -> list[float]:
    """Log-probs, with NaN for the ``null`` that SGLang sends for NaN and infinity."""
    if {float}.issuperset(map(type, values)):
        return [*values]  # type: ignore[list-item]
    return [math.nan if value is None else float(value) for value in values]


def _prompt_logprobs(entries: Sequence[Sequence[Any]]) -> list[float | None]:
    """Those of a prompt. The first token is conditioned on nothing: its ``null`` means that it has none."""
    values: list[float | None] = [*_logprobs([entry[0] for entry in entries])]
    if values and entries[0][0] is None:
        values[0] = None
    return values


def _weight_version(meta: Mapping[str, Any]) -> str:
    return str(meta.get("weight_version", "default"))


def _weight_spans(meta: Mapping[str, Any], num_tokens: int) -> tuple[WeightSpan, ...]:
    """Which weights generated which tokens; empty for all events of a stream but the last."""
    spans = tuple(
        WeightSpan(version=str(span["version"]), start=int(span["start"]), end=int(span["end"]))
        for span in meta.get("weight_versions") or ()
    )
    bounds = [0, *(span.end for span in spans)]
    if spans and (bounds != sorted(bounds) or [*(span.start for span in spans), num_tokens] != bounds):
        raise ValueError(f"weight_versions for {num_tokens} tokens (it has {spans})")
    # The version in an earlier event of a stream is the server's version at that moment, which may be the dirty mark of
    # an update that began after the tokens were generated.
    if spans or meta["finish_reason"] is None:
        return spans
    return (WeightSpan(version=_weight_version(meta), start=0, end=num_tokens),)


def token_versions(reply: GenerateReply) -> list[int]:
    """The weight version of every response token, from the server's spans.

    A token that no span covers has the version at the end of the response.

    Examples:
        >>> spans = (WeightSpan(version="3@a", start=0, end=2), WeightSpan(version="4@a", start=2, end=3))
        >>> token_versions(GenerateReply(output_ids=[5, 6, 7], weight_version="4@a", weight_spans=spans))
        [3, 3, 4]
    """
    versions_R = [version_number(reply.weight_version)] * len(reply.output_ids)
    for span in reply.weight_spans:
        stop = min(span.end, len(versions_R))
        if span.start < stop:
            versions_R[span.start : stop] = [version_number(span.version)] * (stop - span.start)
    return versions_R
