"""Generates a batch over a stream, to report progress while tokens are made."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ProtocolError
from torchrl_sglang.protocol.generate import build_generate, parse_one
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.stream_events import StreamedReply

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
    is sent ``n`` times, each with an id of its own.

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
    sequences = {request_id: StreamedReply(client.url) for request_id in ids}
    last: dict[str, dict[str, Any]] = {}
    counted = dict.fromkeys(ids, 0)
    for event in client.stream(request, timeout_s=timeout_s):
        request_id = str((event.get("meta_info") or {}).get("id", ""))
        sequence = sequences.get(request_id) or StreamedReply(client.url)  # raises what an event without an id says
        last[request_id] = whole = sequence.add(event)
        if request_id not in counted:
            raise ProtocolError(f"{client.url} streamed the sequence {request_id!r}, which nobody requested",
                                server=client.url)  # fmt: skip
        done = len(whole["output_ids"])
        progress(done - counted[request_id])
        counted[request_id] = done
    missing = [index for index, request_id in enumerate(ids) if not sequences[request_id].is_finished]
    if missing:
        raise ProtocolError(f"{client.url} did not finish the sequences {missing[:10]} of a stream", server=client.url)
    return [
        parse_one(last[request_id], server=client.url, return_logprobs=return_logprobs, prompt_logprobs=prompt_logprobs)
        for request_id in ids
    ]
