"""``Serving``: what the routes need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from torchrl_sglang.agents.http.access import key_of
from torchrl_sglang.agents.http.api_errors import bad_request
from torchrl_sglang.agents.http.json_body import read_json_body
from torchrl_sglang.agents.http.token_texts import TokenTexts
from torchrl_sglang.agents.session import Session
from torchrl_sglang.agents.sessions import Sessions

__all__ = ["Serving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """The sessions, and how they are served.

    Attributes:
        sessions: the store of sessions.
        model: the served model's name.
        token_texts: the texts of its tokens.
        admin_key: the key with which sessions are made; ``None`` on a loopback address.
        public_url: the gateway's address as agents see it; ``None`` takes that of the request.
        max_body_bytes: largest body of a request.
        template: the text of the model's chat template.
        context_length: tokens of its context; ``None`` if the servers don't say.
        leaves_out_effort: an effort of reasoning has no effect.
    """

    sessions: Sessions
    model: str
    token_texts: TokenTexts
    admin_key: str | None = None
    public_url: str | None = None
    max_body_bytes: int
    template: str = ""
    context_length: int | None = None
    leaves_out_effort: bool = False

    def session(self, request: Request) -> Session:
        """The session that a request names, if it has the session's key.

        Raises:
            UnknownSessionError: there is none.
            SessionKeyError: the key is missing or wrong.
        """
        return self.sessions.get(request.path_params["session"], key=key_of(request))

    def check_effort(self, effort: str | None) -> None:
        """Refuse an effort of reasoning that the chat template would ignore.

        Raises:
            ApiError: the template has no such variable.
        """
        if effort is not None and "reasoning_effort" not in self.template and not self.leaves_out_effort:
            raise bad_request(
                f"reasoning effort {effort!r:.40} would have no effect: this model's chat template has no variable "
                "reasoning_effort; chat_template_kwargs sets those that it has. Leave it out, or let "
                'the gateway do so: SessionSettings(overrides={"reasoning_effort": None})',
                "reasoning_effort",
                "unsupported_parameter",
            )

    async def body(self, request: Request) -> Any:
        """The parsed body of a request; see :func:`read_json_body`."""
        return await read_json_body(request, max_bytes=self.max_body_bytes)

    def base_url(self, session_id: str, request_url: str) -> str:
        """The address that an agent's client is given."""
        return f"{(self.public_url or request_url).rstrip('/')}/sessions/{session_id}/v1"
