"""Routes of agents: the model, in OpenAI's and Anthropic's forms."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from torchrl_sglang.agents.http.anthropic_reply import AnthropicReply, AnthropicWriter
from torchrl_sglang.agents.http.anthropic_request import read_anthropic
from torchrl_sglang.agents.http.api_errors import ApiError
from torchrl_sglang.agents.http.chat_reply import ChatReply
from torchrl_sglang.agents.http.chat_request import Call, Sending, read_chat, read_text
from torchrl_sglang.agents.http.chunk_writer import ChunkWriter
from torchrl_sglang.agents.http.earlier_responses import EarlierResponses
from torchrl_sglang.agents.http.event_stream import event_stream
from torchrl_sglang.agents.http.responses_reply import ResponsesReply, ResponsesWriter
from torchrl_sglang.agents.http.responses_request import read_responses
from torchrl_sglang.agents.http.running_turn import RunningTurn, until_disconnect
from torchrl_sglang.agents.http.serving import Serving
from torchrl_sglang.agents.http.text_reply import TextReply
from torchrl_sglang.agents.types import ChatRequest, OnProgress, Turn

__all__ = ["ModelRoutes"]


class ModelRoutes:
    """Answers requests to the model.

    Args:
        serving: the sessions.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._created = int(time.time())
        self._earlier = EarlierResponses()

    async def models(self, request: Request) -> Response:
        """``GET .../models``: the one model."""
        self._serving.session(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """``GET .../models/NAME``."""
        self._serving.session(request)
        name = request.path_params["name"]
        if name != self._serving.model:
            raise ApiError(404, f"the model here is {self._serving.model!r}", param="model", code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self._serving.model, "object": "model", "created": self._created, "owned_by": "torchrl-sglang"}

    async def chat(self, request: Request) -> Response:
        """``POST .../chat/completions``."""
        return await self._openai(request, read_chat, ChatReply, "chatcmpl")

    async def completions(self, request: Request) -> Response:
        """``POST .../completions``."""
        return await self._openai(request, read_text, TextReply, "cmpl")

    async def responses(self, request: Request) -> Response:
        """``POST .../responses``."""
        session = self._serving.session(request)
        body = await self._serving.body(request)
        earlier = self._earlier.messages(session, body)
        call = read_responses(body, sending_of(request), earlier)
        reply = ResponsesReply(
            id=f"resp_{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self._serving.model,
            body=body,
            texts=self._serving.token_texts if call.log_probs else None,
        )

        async def run(report: OnProgress | None) -> Turn:
            turn = await _run(session, call, report)
            self._earlier.add(session, reply.id, _conversation(call, body, turn))
            return turn

        if not call.stream:
            return JSONResponse(reply.whole(await until_disconnect(request, run(None))))
        return await event_stream(request, RunningTurn(run), lambda: ResponsesWriter(reply))

    async def messages(self, request: Request) -> Response:
        """``POST .../messages``, Anthropic's."""
        session = self._serving.session(request)
        call = read_anthropic(await self._serving.body(request), sending_of(request))
        reply = AnthropicReply(id=f"msg_{uuid.uuid4().hex}", model=self._serving.model)
        if not call.stream:
            return JSONResponse(reply.whole(await until_disconnect(request, _run(session, call, None))))
        turn = RunningTurn(lambda report: _run(session, call, report))
        return await event_stream(request, turn, lambda: AnthropicWriter(reply))

    async def _openai(
        self, request: Request, read: Callable[[Any, Sending], Call], form: type[ChatReply | TextReply], prefix: str
    ) -> Response:
        session = self._serving.session(request)
        call = read(await self._serving.body(request), sending_of(request))
        reply = form(
            id=f"{prefix}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self._serving.model,
            texts=self._serving.token_texts if call.log_probs else None,
        )
        if not call.stream:
            return JSONResponse(reply.whole(await until_disconnect(request, _run(session, call, None))))
        turn = RunningTurn(lambda report: _run(session, call, report))
        return await event_stream(request, turn, lambda: ChunkWriter(reply, include_usage=call.include_usage))


async def _run(session: Any, call: Call, report: OnProgress | None) -> Turn:
    if isinstance(call.request, ChatRequest):
        turn: Turn = await session.chat(call.request, report)
    else:
        turn = await session.complete(call.request, report)
    return turn


def _conversation(call: Call, body: Any, turn: Turn) -> list[Mapping[str, Any]]:
    """The messages that a later request continues. As in OpenAI's API, the instructions are of one request only."""
    assert isinstance(call.request, ChatRequest)
    messages = call.request.messages
    return [*messages[body.get("instructions") is not None :], turn.choices[0].message]


def sending_of(request: Request) -> Sending:
    """How the client sent a request, by its headers."""
    count = request.headers.get("x-stainless-retry-count", "0")
    return Sending(
        idempotency_key=request.headers.get("idempotency-key") or None,
        is_retry=count.isdigit() and int(count) > 0,
    )
