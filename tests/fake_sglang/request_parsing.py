"""Parses the body of a ``/generate`` request into sequences; refuses invalid ones with SGLang's messages."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from tests.fake_sglang.adapters import Adapters
from tests.fake_sglang.calls import BadRequest, Call, Reply, bad_request
from tests.fake_sglang.sequences import Sampling, Sequence
from tests.fake_sglang.vocabulary import Vocabulary

__all__ = ["parse_sequences"]

_SAMPLING_FIELDS = (
    "max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "json_schema", "regex",
    "ebnf", "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim",
    "stream_interval", "logit_bias", "sampling_seed", "custom_params", "beam_width", "watermark", "choice",
)  # fmt: skip


def parse_sequences(
    call: Call,
    vocabulary: Vocabulary,
    adapters: Adapters,
    *,
    checks_names: bool = True,
    preferred: Mapping[str, Any] | None = None,
) -> tuple[list[Sequence], bool]:
    """The sequences to generate, prompt-major, and whether the reply is a list.

    Args:
        call: the request.
        vocabulary: the model's tokens and context length.
        adapters: the LoRA adapters a request may name.
        checks_names: whether the refusal of an unknown sampling parameter names it; up to 0.5.20 it is a bare 500.
        preferred: sampling parameters for what a request leaves out, except ``n``.

    Raises:
        BadRequest: the request is invalid.
    """
    if not isinstance(call.body, Mapping):
        call.value("input_ids", list)
    body = call.body
    prompts, is_batch = _prompts(call, vocabulary)
    params = body.get("sampling_params") or {}
    per_prompt = params if isinstance(params, list) else [params] * len(prompts)
    if len(per_prompt) != len(prompts):
        raise bad_request("The length of sampling_params should be equal to the batch size.")
    samplings = [_sampling({**(preferred or {}), **p}, checks_names) for p in per_prompt]
    copies = {int(p.get("n", 1)) for p in per_prompt}
    if len(copies) > 1:
        raise bad_request("The parallel_sample_num should be the same for all samples in sample params.")
    n = copies.pop() if copies else 1
    rids = _rids(body.get("rid"), len(prompts), n)
    names = _adapter_names(body.get("lora_path"), len(prompts), adapters)
    logprobs = body.get("return_logprob") or False
    with_logprobs = logprobs if isinstance(logprobs, list) else [logprobs] * len(prompts)
    start = int(body.get("logprob_start_len", -1))
    out = []
    for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        _check_length(len(prompt), sampling.max_new_tokens, vocabulary.context_length)
        for copy in range(n):
            out.append(
                Sequence(
                    prompt=prompt,
                    sampling=sampling,
                    rid=rids[i * n + copy],
                    logprobs=bool(with_logprobs[i]),
                    logprob_start=start if with_logprobs[i] and start >= 0 else None,
                    top_logprobs=int(body.get("top_logprobs_num") or 0) if with_logprobs[i] else 0,
                    adapter=names[i],
                )
            )
    return out, is_batch or n > 1


def _prompts(call: Call, vocabulary: Vocabulary) -> tuple[list[list[int]], bool]:
    ids = call.value("input_ids", list, None)
    if ids is None:
        text = call.value("text", (str, list), None)
        if text is None:
            raise bad_request("Either text, input_ids or input_embeds should be provided.")
        texts = [text] if isinstance(text, str) else text
        return [vocabulary.encode(t) for t in texts], not isinstance(text, str)
    if not ids:
        raise bad_request("input_ids cannot be empty.")
    is_batch = isinstance(ids[0], list)
    prompts = [list(p) for p in ids] if is_batch else [list(ids)]
    if not all(isinstance(i, int) for prompt in prompts for i in prompt):
        raise bad_request("Value error, elements must be int or list")
    return prompts, is_batch


def _sampling(params: Mapping[str, Any], checks_names: bool) -> Sampling:
    unknown = [name for name in params if name not in _SAMPLING_FIELDS]
    if unknown:
        if not checks_names:
            raise BadRequest(Reply(status=500, body="Internal Server Error"))
        known = ", ".join(f"`{name}`" for name in _SAMPLING_FIELDS)
        error = f"unknown field `{unknown[0]}`, expected one of {known}"
        raise BadRequest(Reply(status=400, body={"error": error}))
    stop = params.get("stop") or ()
    params = {name: value for name, value in params.items() if value is not None}
    sampling = Sampling(
        max_new_tokens=int(params.get("max_new_tokens", 128)),
        temperature=float(params.get("temperature", 1.0)),
        top_p=float(params.get("top_p", 1.0)),
        top_k=int(params.get("top_k", -1)),
        min_p=float(params.get("min_p", 0.0)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(params.get("stop_token_ids") or ()),
        ignore_eos=bool(params.get("ignore_eos", False)),
    )
    if sampling.max_new_tokens < 0:
        raise bad_request(f"max_new_tokens must be at least 0, got {sampling.max_new_tokens}.")
    if not 0 <= sampling.temperature < float("inf"):
        given = params["temperature"]
        raise bad_request(f"temperature must be a non-negative finite number, got {given}.")
    if not 0 < sampling.top_p <= 1:
        given = params["top_p"]
        raise bad_request(f"top_p must be in (0, 1], got {given}.")
    return sampling


def _rids(given: Any, num_prompts: int, n: int) -> list[str]:
    if given is None or n > 1:  # with n > 1 SGLang generates new ids
        return [uuid.uuid4().hex for _ in range(num_prompts * n)]
    if isinstance(given, list):
        return [str(rid) for rid in given]
    return [str(given)] if num_prompts == 1 else [f"{given}_{i}" for i in range(num_prompts)]


def _adapter_names(given: Any, num_prompts: int, adapters: Adapters) -> list[str | None]:
    names = given if isinstance(given, list) else [given] * num_prompts
    for name in names:
        if name is not None:
            adapters.require(name)
    return names


def _check_length(prompt_tokens: int, new_tokens: int, limit: int) -> None:
    if prompt_tokens >= limit:
        raise bad_request(
            f"The input ({prompt_tokens} tokens) is longer than the model's context length ({limit} tokens)."
        )
    if prompt_tokens + new_tokens > limit:
        raise bad_request(
            f"Requested token count exceeds the model's maximum context length of {limit} tokens. You requested a "
            f"total of {prompt_tokens + new_tokens} tokens: {prompt_tokens} tokens from the input messages and "
            f"{new_tokens} tokens for the completion. Please reduce the number of tokens in the input messages or "
            "the completion to fit within the limit."
        )
