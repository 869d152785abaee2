"""Records of SGLang's HTTP API: a request, a generated sequence, and a server's model and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["GenerateReply", "HttpRequest", "ServerInfo", "TimeoutKind", "WeightSpan"]

TimeoutKind = Literal["probe", "control", "generate", "update"]
"""Which of :class:`~torchrl_sglang.ClientConfig`'s time-outs applies to a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """One request, not yet sent.

    Attributes:
        method: HTTP method.
        path: absolute path on the server.
        body: JSON body; ``None`` sends none. A list of ``bytes`` in it is sent as strings: base64, tens of megabytes.
        timeout: which time-out applies.
        repeatable: the request only reads, so it may be sent again even if the first one may have run.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    body: Mapping[str, Any] | None = None
    timeout: TimeoutKind = "control"
    repeatable: bool = False

    def content(self) -> bytes | None:
        """The body as JSON text.

        ``json`` looks at each character of a string for what it must escape: for 64 MiB of base64 longer than it takes
        to make them.

        Examples:
            >>> HttpRequest(method="POST", path="/", body={"a": [1, 2], "b": [b"YQ==", b"Yg=="]}).content()
            b'{"a": [1, 2], "b": ["YQ==", "Yg=="]}'
            >>> HttpRequest(method="POST", path="/", body={}).content()
            b'{}'
        """
        if self.body is None:
            return None
        parts = []
        for name, value in self.body.items():
            if isinstance(value, list) and value and isinstance(value[0], bytes):
                parts.append(b'%s: ["%s"]' % (json.dumps(name).encode(), b'", "'.join(value)))
            else:
                parts.append(json.dumps({name: value})[1:-1].encode())
        return b"{%s}" % b", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpan:
    """Weight version ``version`` (the server's string) generated the response tokens ``start <= i < end``."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateReply:
    """One generated (or scored) sequence as the server reported it. ``T`` is the number of response tokens.

    Attributes:
        output_ids: response token ids, length ``T``; a matched stop token is included.
        output_logprobs: natural-log probability of each response token, length ``T``, NaN where the server computed NaN
            or infinity; ``None`` when not requested.
        prompt_logprobs: one entry per prompt token, the first ``None``, NaN as above; ``None`` when not requested.
        support_ids: per response token the ids that top-k, top-p and min-p kept; ``None`` when not requested.
        support_logprobs: log-prob of each response token among those ids; ``None`` when not requested.
        text: the server's decoded response (stop strings trimmed).
        finish_reason: ``"stop"``, ``"length"`` or ``"abort"``.
        matched: the stop token id or stop string that ended the response, if one did.
        abort_message: the server's message when ``finish_reason`` is ``"abort"``.
        prompt_tokens: number of prompt tokens.
        completion_tokens: number of response tokens.
        cached_tokens: prompt tokens served from the prefix cache.
        weight_version: weight version at the end of the response (the server's string).
        weight_spans: which version generated which tokens, in order, covering ``[0, T)``; in a stream only the last
            event has them.
        request_id: the server's id of the request.
        latency_s: seconds from arrival to completion as the server measured them.
        server: base URL of the server that answered.
    """

    output_ids: list[int]
    output_logprobs: list[float] | None = None
    prompt_logprobs: list[float | None] | None = None
    support_ids: list[list[int]] | None = None
    support_logprobs: list[float] | None = None
    text: str = ""
    finish_reason: Literal["stop", "length", "abort"] = "length"
    matched: int | str | None = None
    abort_message: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    weight_version: str = "default"
    weight_spans: tuple[WeightSpan, ...] = ()
    request_id: str = ""
    latency_s: float = 0.0
    server: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """A server's model and settings, as it reported them on connect.

    Attributes:
        url: base URL.
        version: SGLang's version string.
        model_path: the served checkpoint, as given to the server.
        tokenizer_path: the served tokenizer, as given to the server.
        revision: branch, tag or commit of both on the hub (``--revision``); ``None`` is the default branch.
        dtype: the server's ``--dtype``: ``"auto"``, ``"float32"``, ``"bfloat16"``...
        architectures: the checkpoint's architectures, e.g. ``("LlamaForCausalLM",)``.
        is_generation: ``False`` for embedding and reward models.
        tp_size: tensor-parallel ranks (each is one rank of the process group for weights).
        dp_size: data-parallel replicas inside this server; weight updates need 1.
        pp_size: pipeline-parallel stages; weight updates need 1.
        max_prompt_tokens: longest prompt the server accepts, in tokens.
        context_length: limit of prompt plus response, in tokens: two less than the model's context, of which SGLang
            keeps them; ``None`` when the server does not report it.
        vocab_size: number of valid token ids; ``None`` when unknown (the checkpoint can't be read on this machine).
        weight_version: the server's weight version string at connect time.
        device: ``"cpu"``, ``"cuda"``, ...
        lora_enabled: whether adapters can be loaded.
        quantization: the server's ``--quantization``, if any.
        grammar_backend: what constrains responses to grammars; ``"none"`` when nothing does.
        skips_tokenizer: launched with ``--skip-tokenizer-init``: replies have no text, and there are no stop strings.
        preferred_sampling: the sampling parameters that the server fills in where a request leaves them out.
        raw: the answer of ``/server_info``, for settings without a field here.
    """

    url: str
    version: str
    model_path: str
    tokenizer_path: str
    revision: str | None = None
    dtype: str = "auto"
    architectures: tuple[str, ...] = ()
    is_generation: bool = True
    tp_size: int = 1
    dp_size: int = 1
    pp_size: int = 1
    max_prompt_tokens: int | None = None
    context_length: int | None = None
    vocab_size: int | None = None
    weight_version: str = "default"
    device: str = "cuda"
    lora_enabled: bool = False
    quantization: str | None = None
    grammar_backend: str | None = None
    skips_tokenizer: bool = False
    preferred_sampling: frozenset[str] = frozenset()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
