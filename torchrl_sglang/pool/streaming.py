"""Generates a batch over a stream, to report progress while tokens are made."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ProtocolError, RequestRejectedError
from torchrl_sglang.protocol.generate import build_generate, parse_one
from torchrl_sglang.protocol.messages import GenerateReply

__all__ = ["generate_streaming"]


def generate_streaming(
    client: SGLangClient,
    ids_B_T: Sequence[Sequence[int]],
    sampling: SamplingParams,
    *,
    progress: Callable[[int], None],
    return_logprobs: bool = True,
    prompt_logprobs: bool = False,
    timeout_s: float | None = None,
    lora: str | None = None,
    cache_salt: str | None = None,
) -> list[GenerateReply]:
    """Generate on one server like one ``/generate`` call, and report progress.

    Events of a batch arrive interleaved, without an index, and with the request's id only if ``n`` is 1: so each prompt
    is sent ``n`` times, each with an id of its own. Events are cumulative.

    Args:
        client: the server.
        ids_B_T: prompt token ids.
        sampling: how tokens are drawn.
        progress: called with the number of new tokens since its last call.
        return_logprobs: report response log-probs.
        prompt_logprobs: report prompt log-probs.
        timeout_s: seconds between two events.
        lora: name of a loaded adapter.
        cache_salt: name space in the prefix cache.

    Returns:
        ``B * n`` replies, prompt-major.

    Raises:
        ServerError: as :meth:`SGLangClient.stream`.
        ProtocolError: the stream ended without finishing every sequence.
    """
    repeated = [ids_T for ids_T in ids_B_T for _ in range(sampling.n)]
    ids = [uuid.uuid4().hex for _ in repeated]
    request = build_generate(
        repeated,
        replace(sampling, n=1),
        return_logprobs=return_logprobs,
        prompt_logprobs=prompt_logprobs,
        stream=True,
        request_ids=ids,
        lora=lora,
        cache_salt=cache_salt,
    )
    last: dict[str, dict[str, Any]] = {}
    counted: dict[str, int] = {}
    for event in client.stream(request, timeout_s=timeout_s):
        if "meta_info" not in event:
            raise RequestRejectedError(f"{client.url} stopped the stream: {event}", server=client.url, status=200)
        request_id = event["meta_info"].get("id", "")
        done = int(event["meta_info"].get("completion_tokens", 0))
        progress(done - counted.get(request_id, 0))
        counted[request_id] = done
        last[request_id] = event
    missing = [index for index, request_id in enumerate(ids) if request_id not in last]
    if missing:
        raise ProtocolError(f"{client.url} streamed nothing for sequences {missing[:10]}", server=client.url)
    return [
        parse_one(last[request_id], server=client.url, return_logprobs=return_logprobs, prompt_logprobs=prompt_logprobs)
        for request_id in ids
    ]
