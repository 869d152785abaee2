"""``/chat/completions`` and ``/completions``: the body of a request as what the session is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrl_sglang.agents.http.api_errors import bad_request
from torchrl_sglang.agents.http.chat_extensions import (
    add_grammar,
    add_stop_trim,
    ignore_foreign,
    read_variables,
    refuse_foreign,
)
from torchrl_sglang.agents.http.chat_messages import check_messages, check_tools, read_tool_choice
from torchrl_sglang.agents.http.fields import Fields
from torchrl_sglang.agents.http.old_functions import has_old_functions, with_tools
from torchrl_sglang.agents.http.sampling_fields import MOST_TOP_LOGPROBS, read_sampling
from torchrl_sglang.agents.types import ChatRequest, TextRequest

__all__ = ["WITHOUT_EFFECT", "Call", "Sending", "read_chat", "read_text"]

MOST_PROMPTS = 2048
"""As in OpenAI's API."""
# They tell OpenAI's platform something, and change no token.
WITHOUT_EFFECT = (
    *("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """How the client sent a request.

    Attributes:
        idempotency_key: its ``Idempotency-Key``, if it has one.
        attempt: how often it says that it has sent the request before (``x-stainless-retry-count``).
    """

    idempotency_key: str | None = None
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that was read.

    Attributes:
        request: what the session is asked for.
        model: the name that the client gave the model; a session has one model, so any name is taken.
        stream: answer in pieces.
        include_usage: end the stream with the numbers of tokens.
        log_probs: report the log-prob of every sampled token.
        tokens_as_ids: name tokens by their ids there, instead of their texts (vLLM's ``return_tokens_as_token_ids``).
        has_token_ids: report the token ids of prompt and answer (vLLM's ``return_token_ids``).
        effort: the effort of reasoning, if one was given; it is among the template's variables.
        other_prompts: of a request with several prompts, those after the first.
        has_old_functions: write a tool call as ``function_call``, as the request gave its tools as ``functions``.
    """

    request: ChatRequest | TextRequest
    model: str
    stream: bool = False
    include_usage: bool = False
    log_probs: bool = False
    tokens_as_ids: bool = False
    has_token_ids: bool = False
    effort: str | None = None
    other_prompts: tuple[TextRequest, ...] = ()
    has_old_functions: bool = False


def read_chat(body: Any, sending: Sending) -> Call:
    """The body of ``/chat/completions``.

    Raises:
        ApiError: a field that is wrong, unknown, or can't be honoured; ``param`` names it.
    """
    fields = Fields(with_tools(body))
    model, stream, include_usage = _read_common(fields)
    messages = check_messages(fields.list("messages", required=True) or [])
    tools = check_tools(fields.list("tools"))
    choice = fields.any("tool_choice")
    choice = read_tool_choice(choice, [tool["function"]["name"] for tool in tools])
    log_probs = bool(fields.flag("logprobs"))
    top = fields.integer("top_logprobs", at_least=0, at_most=MOST_TOP_LOGPROBS) or 0
    if top and not log_probs:
        raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
    sampling = read_sampling(fields)
    _add_limit(sampling, fields, "max_completion_tokens", "max_tokens")
    add_grammar(sampling, fields)
    add_stop_trim(sampling, fields)
    variables = read_variables(fields)
    effort = fields.text("reasoning_effort")
    if effort is not None:
        variables["reasoning_effort"] = effort
    _refuse_what_chat_cannot(fields)
    parallel = fields.flag("parallel_tool_calls")
    tokens_as_ids, has_token_ids = fields.flag("return_tokens_as_token_ids"), fields.flag("return_token_ids")
    fields.refuse_unread()
    return Call(
        request=ChatRequest(
            messages=messages,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=parallel,
            template_kwargs=variables,
            sampling=sampling,
            top_logprobs=top,
            idempotency_key=sending.idempotency_key,
            attempt=sending.attempt,
        ),
        model=model,
        stream=stream,
        include_usage=include_usage,
        log_probs=log_probs,
        effort=effort,
        has_old_functions=has_old_functions(body),
        tokens_as_ids=bool(tokens_as_ids),
        has_token_ids=bool(has_token_ids),
    )


def _refuse_what_chat_cannot(fields: Fields) -> None:
    refuse_foreign(fields, is_chat=True)
    fields.refuse("modalities", "the model writes text only", neutral=(["text"],))
    fields.refuse("audio", "the model writes text only")
    fields.refuse("prediction", "SGLang takes no predicted text")
    if fields.any("web_search_options") is not None:  # {} asks for a search, too
        raise bad_request(
            "web_search_options can't be honoured: there is no web search; give the model a tool",
            "web_search_options",
            "unsupported_parameter",
        )
    fields.refuse("verbosity", "say it in the system message", neutral=("medium",))


def read_text(body: Any, sending: Sending) -> Call:
    """The body of ``/completions``.

    Raises:
        ApiError: as :func:`read_chat`.
    """
    fields = Fields(body)
    model, stream, include_usage = _read_common(fields)
    prompts = _read_prompts(fields.any("prompt"))
    if stream and len(prompts) > 1:
        raise bad_request("a stream has one prompt: send one per request", "prompt", "unsupported_parameter")
    top = fields.integer("logprobs", at_least=0, at_most=MOST_TOP_LOGPROBS)
    sampling = read_sampling(fields)
    _add_limit(sampling, fields, "max_tokens")
    add_grammar(sampling, fields)
    add_stop_trim(sampling, fields)
    sampling.setdefault("max_new_tokens", 16)  # OpenAI's default of this endpoint
    fields.refuse("best_of", "send n=, and choose yourself", neutral=(1, sampling.get("n", 1)))
    fields.refuse("echo", "the gateway scores no prompts; ask the SGLang server itself", neutral=(False,))
    fields.refuse("suffix", "the model only continues texts", neutral=("",))
    has_text = any(isinstance(prompt, str) for prompt in prompts)
    fields.refuse(
        "add_special_tokens",
        "a text gets those that the tokenizer adds; send token ids",
        neutral=(True,) if has_text else (True, False),
    )
    refuse_foreign(fields, is_chat=False)
    tokens_as_ids, has_token_ids = fields.flag("return_tokens_as_token_ids"), fields.flag("return_token_ids")
    fields.refuse_unread()
    key = sending.idempotency_key
    requests = [
        TextRequest(
            prompt=prompt,
            sampling=sampling,
            top_logprobs=top or 0,
            idempotency_key=key if key is None or not index else f"{key} {index}",
            attempt=sending.attempt,
        )
        for index, prompt in enumerate(prompts)
    ]
    return Call(
        request=requests[0],
        other_prompts=tuple(requests[1:]),
        model=model,
        stream=stream,
        include_usage=include_usage,
        log_probs=top is not None,
        tokens_as_ids=bool(tokens_as_ids),
        has_token_ids=bool(has_token_ids),
    )


def _read_common(fields: Fields) -> tuple[str, bool, bool]:
    """The model's name, whether to stream, and whether to end a stream with its usage."""
    fields.ignore(*WITHOUT_EFFECT)
    ignore_foreign(fields)
    model = fields.required_text("model")
    stream = bool(fields.flag("stream"))
    options = fields.object("stream_options")
    if options is None:
        return model, stream, False
    if not stream:
        raise bad_request("stream_options needs stream=true", "stream_options")
    inner = Fields(options, "stream_options")
    inner.ignore("include_obfuscation")
    inner.refuse("continuous_usage_stats", "a stream's last piece has the usage", neutral=(False,))
    include_usage = bool(inner.flag("include_usage"))
    inner.refuse_unread()
    return model, stream, include_usage


def _read_prompts(prompt: Any) -> list[str | tuple[int, ...]]:
    """One prompt or several: each is a text, or token ids."""
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (str, list))
    prompts = prompt if several else [prompt]
    if len(prompts) > MOST_PROMPTS:
        raise bad_request(f"prompt holds {len(prompts)} prompts; at most {MOST_PROMPTS} go into a request", "prompt")
    return [_read_prompt(each) for each in prompts]


def _read_prompt(prompt: Any) -> str | tuple[int, ...]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        return tuple(prompt)
    raise bad_request(
        f"prompt must be a text or a list of token ids, or a list of those, got {prompt!r:.100}", "prompt"
    )


def _add_limit(sampling: dict[str, Any], fields: Fields, *names: str) -> None:
    """Put the most tokens of an answer, which has two names, into ``sampling``."""
    given = {name: fields.integer(name, at_least=1) for name in names}
    limits = {value for value in given.values() if value is not None}
    if len(limits) > 1:
        raise bad_request(f"{' and '.join(names)} are two names of one limit, but differ: send one", names[0])
    if limits:
        sampling["max_new_tokens"] = limits.pop()
