"""This package's errors as answers with a status."""

from __future__ import annotations

from torchrl_sglang.agents.http.api_errors import ApiError
from torchrl_sglang.errors import (
    ConfigError,
    ContextLengthError,
    OverloadedError,
    ProtocolError,
    RequestRejectedError,
    ServerError,
    ServerLostError,
    ServerTimeoutError,
    SessionFinishedError,
    SessionKeyError,
    SGLangError,
    UnknownSessionError,
    WeightSyncError,
)

__all__ = ["api_error"]

_SERVER_RETRY_S = 5.0
"""A server that died is restarted, or quarantined, within seconds."""


def api_error(error: SGLangError) -> ApiError:
    """The answer that tells a client of an error. The session stays as it was before the request.

    Examples:
        >>> api_error(UnknownSessionError("there is no session 'a'")).status
        404
        >>> api_error(ContextLengthError("too long")).code
        'context_length_exceeded'
    """
    message = str(error)
    if isinstance(error, ContextLengthError):
        return ApiError(
            400,
            f"{_openai_too_long(error)}{message}",
            param="messages",
            code="context_length_exceeded",
            anthropic_message=f"{_too_long(error)}{message}",
        )
    if isinstance(error, ConfigError):
        return ApiError(400, message, code="invalid_value")
    if isinstance(error, SessionKeyError):
        return ApiError(401, message, code="invalid_api_key")
    if isinstance(error, UnknownSessionError):
        return ApiError(404, message, code="session_not_found")
    if isinstance(error, SessionFinishedError):
        return ApiError(409, message, code="session_finished")
    if isinstance(error, OverloadedError):
        return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=error.retry_after_s)
    if isinstance(error, RequestRejectedError) and error.status == 400:  # such as a grammar that can't be compiled
        return ApiError(400, message, code="invalid_value")
    if isinstance(error, ServerTimeoutError):
        return ApiError(504, message, code="upstream_timeout")
    if isinstance(error, (ServerLostError, RequestRejectedError, ProtocolError)):
        return ApiError(502, message, code="upstream_error")
    if isinstance(error, (ServerError, WeightSyncError)):  # no server is left, or none may be used
        return ApiError(503, message, code="upstream_unavailable", retry_after_s=_SERVER_RETRY_S)
    return ApiError(500, message, code="internal_error")


def _openai_too_long(error: ContextLengthError) -> str:
    """The words of OpenAI's and vLLM's servers: some frameworks look for them, and not for the code."""
    if error.limit is None:
        return "The prompt is longer than the model's maximum context length: "
    return f"This model's maximum context length is {error.limit} tokens: "


def _too_long(error: ContextLengthError) -> str:
    """Anthropic's words, by which its clients ask again for a shorter answer, or shorten the conversation.

    Examples:
        >>> _too_long(ContextLengthError("", prompt_tokens=9, response_tokens=8, limit=16))
        'input length and `max_tokens` exceed context limit: 9 + 8 > 16: '
    """
    if error.prompt_tokens is None:
        return "prompt is too long: "
    if error.response_tokens:
        numbers = f"{error.prompt_tokens} + {error.response_tokens} > {error.limit}"
        return f"input length and `max_tokens` exceed context limit: {numbers}: "
    return f"prompt is too long: {error.prompt_tokens} tokens > {error.limit} maximum: "
