"""``ApiError``: an answer with an error status, in OpenAI's and in Anthropic's form."""

from __future__ import annotations

from typing import Any

__all__ = ["ApiError", "bad_request"]

# Per status: OpenAI's type, and Anthropic's.
_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("invalid_request_error", "authentication_error"),
    403: ("invalid_request_error", "permission_error"),
    404: ("invalid_request_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    409: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
}
_SERVER_TYPES = ("server_error", "api_error")


class ApiError(Exception):
    """The answer to a request that can't be honoured.

    Attributes:
        status: HTTP status.
        message: what is wrong, and what to do.
        param: the field of the request that is at fault, if one is.
        code: a word for programs.
        anthropic_message: ``message`` in the words by which Anthropic's clients know an error.
        retry_after_s: after how many seconds the request may be sent again; ``None``: the same request fails again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        anthropic_message: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.anthropic_message = anthropic_message or message

    @property
    def headers(self) -> dict[str, str]:
        """``Retry-After``, or a word to OpenAI's clients, which would send a 409 again three times."""
        if self.retry_after_s is not None:
            return {"retry-after": str(max(1, round(self.retry_after_s)))}
        return {"x-should-retry": "false"} if self.status == 409 else {}

    def openai(self) -> dict[str, Any]:
        """The body in OpenAI's form.

        Examples:
            >>> ApiError(404, "there is no session 'a'", code="session_not_found").openai()["error"]["code"]
            'session_not_found'
        """
        kind = _TYPES.get(self.status, _SERVER_TYPES)[0]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """The body in Anthropic's form.

        Examples:
            >>> ApiError(401, "wrong key").anthropic()
            {'type': 'error', 'error': {'type': 'authentication_error', 'message': 'wrong key'}}
        """
        kind = _TYPES.get(self.status, _SERVER_TYPES)[1]
        return {"type": "error", "error": {"type": kind, "message": self.anthropic_message}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A refusal with status 400."""
    return ApiError(400, message, param=param, code=code)
