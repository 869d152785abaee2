"""Routes of agents: the model, in OpenAI's and Anthropic's forms."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from torchrl_sglang.agents.http.anthropic_reply import AnthropicReply, AnthropicWriter
from torchrl_sglang.agents.http.anthropic_request import read_anthropic
from torchrl_sglang.agents.http.api_errors import ApiError
from torchrl_sglang.agents.http.chat_reply import ChatReply
from torchrl_sglang.agents.http.chat_request import Call, Sending, read_chat, read_text
from torchrl_sglang.agents.http.chunk_writer import ChunkWriter
from torchrl_sglang.agents.http.earlier_responses import EarlierResponses
from torchrl_sglang.agents.http.event_stream import EventWriter, event_stream
from torchrl_sglang.agents.http.fields import Fields
from torchrl_sglang.agents.http.json_reply import JsonReply
from torchrl_sglang.agents.http.many_prompts import complete_all, joined_answer
from torchrl_sglang.agents.http.responses_reply import ResponsesReply, ResponsesWriter
from torchrl_sglang.agents.http.responses_request import read_responses
from torchrl_sglang.agents.http.responses_tools import ResponsesTools
from torchrl_sglang.agents.http.running_turn import RunningTurn, until_disconnect
from torchrl_sglang.agents.http.serving import Serving
from torchrl_sglang.agents.http.text_reply import TextReply
from torchrl_sglang.agents.http.token_texts import TokenIdTexts, TokenTexts
from torchrl_sglang.agents.session import Session
from torchrl_sglang.agents.types import ChatRequest, OnProgress, TextRequest, Turn

__all__ = ["ModelRoutes"]

_MOST_DIGITS = 9

Reply = ChatReply | TextReply | ResponsesReply | AnthropicReply


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
        model = self._model()
        page = {"has_more": False, "first_id": model["id"], "last_id": model["id"]}  # Anthropic's
        return JsonReply({"object": "list", "data": [model], **page})

    async def model(self, request: Request) -> Response:
        """``GET .../models/NAME``."""
        self._serving.session(request)
        name = request.path_params["name"]
        if name != self._serving.model:
            raise ApiError(404, f"the model here is {self._serving.model!r}", param="model", code="model_not_found")
        return JsonReply(self._model())

    def _model(self) -> dict[str, Any]:
        made = {"id": self._serving.model, "object": "model", "created": self._created, "owned_by": "torchrl-sglang"}
        made |= {
            "type": "model",
            "display_name": self._serving.model,
            "created_at": _written(self._created),
        }  # Anthropic's
        # As vLLM and SGLang call it: agents shorten their conversations in time.
        length = self._serving.context_length
        return made if length is None else {**made, "max_model_len": length}

    async def chat(self, request: Request) -> Response:
        """``POST .../chat/completions``."""
        session = self._serving.session(request)
        call = read_chat(await self._serving.body(request), sending_of(request))
        reply = ChatReply(
            id=_new_id("chatcmpl-"),
            created=int(time.time()),
            model=self._model_name,
            has_old_functions=call.has_old_functions,
            **self._asked(call),
        )
        return await self._answer(request, session, call, reply)

    async def completions(self, request: Request) -> Response:
        """``POST .../completions``."""
        session = self._serving.session(request)
        call = read_text(await self._serving.body(request), sending_of(request))
        reply = TextReply(id=_new_id("cmpl-"), created=int(time.time()), model=self._model_name, **self._asked(call))
        if call.other_prompts:
            return await self._complete_all(request, session, call, reply)
        return await self._answer(request, session, call, reply)

    async def _complete_all(self, request: Request, session: Session, call: Call, reply: TextReply) -> Response:
        assert isinstance(call.request, TextRequest)

        def undelivered(turns: list[Turn]) -> None:
            for turn in turns:
                session.undelivered(turn)

        work = complete_all(session, (call.request, *call.other_prompts))
        turns = await until_disconnect(request, work, undelivered=undelivered)
        return JsonReply(joined_answer(turns, reply), headers=_request_id(reply))

    async def responses(self, request: Request) -> Response:
        """``POST .../responses``."""
        session = self._serving.session(request)
        body = await self._serving.body(request)
        tools = ResponsesTools(Fields(body).list("tools") or ())
        call = read_responses(
            body,
            sending_of(request),
            self._earlier.messages(session, body),
            tools=tools,
            items=self._earlier.items(session),
        )
        reply = ResponsesReply(
            id=_new_id("resp_"),
            created=int(time.time()),
            model=self._model_name,
            body=body,
            texts=self._texts(call),
            tools=tools,
        )

        def keep(turn: Turn) -> None:
            items = replace(reply, texts=None).items(turn.choices[0])
            self._earlier.add(session, reply.id, _conversation(call, body, turn), items)

        return await self._answer(request, session, call, reply, keep=keep)

    async def messages(self, request: Request) -> Response:
        """``POST .../messages``, Anthropic's."""
        session = self._serving.session(request)
        body = await self._serving.body(request)
        call = read_anthropic(body, sending_of(request), template=self._serving.template)
        reply = AnthropicReply(
            id=_new_id("msg_"),
            model=self._model_name,
            stops=tuple(call.request.sampling.get("stop") or ()),
            manages_context=bool(body.get("context_management")),
        )
        return await self._answer(request, session, call, reply)

    async def count_tokens(self, request: Request) -> Response:
        """``POST .../messages/count_tokens``, Anthropic's: the length of a prompt, which is not sent."""
        session = self._serving.session(request)
        body = await self._serving.body(request)
        call = read_anthropic(body, sending_of(request), template=self._serving.template, counts=True)
        assert isinstance(call.request, ChatRequest)
        return JsonReply({"input_tokens": await session.count_tokens(call.request)})

    @property
    def _model_name(self) -> str:
        return self._serving.model

    def _texts(self, call: Call) -> TokenTexts | None:
        return self._serving.token_texts if call.log_probs else None

    def _asked(self, call: Call) -> dict[str, Any]:
        """What the reply to a call has of tokens."""
        texts: TokenTexts | TokenIdTexts | None = self._texts(call)
        if isinstance(texts, TokenTexts) and call.tokens_as_ids:
            texts = TokenIdTexts(texts)
        return {"texts": texts, "has_token_ids": call.has_token_ids}

    async def _answer(
        self,
        request: Request,
        session: Session,
        call: Call,
        reply: Reply,
        *,
        keep: Callable[[Turn], None] | None = None,
    ) -> Response:
        """Run a turn, and answer with it, whole or in pieces."""
        self._serving.check_effort(call.effort)

        async def run(report: OnProgress | None) -> Turn:
            asked = call.request
            work = session.chat(asked, report) if isinstance(asked, ChatRequest) else session.complete(asked, report)
            turn = await work
            if keep is not None:
                keep(turn)
            return turn

        if call.stream:
            writer = _writer(reply, include_usage=call.include_usage)
            stream = await event_stream(request, RunningTurn(run), writer, undelivered=session.undelivered)
            stream.headers.update(_request_id(reply))
            return stream
        turn = await until_disconnect(request, run(None), undelivered=session.undelivered)
        return JsonReply(reply.whole(turn), headers=_request_id(reply))


def _written(time_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))


def _request_id(reply: Reply) -> dict[str, str]:
    """The headers by which OpenAI's and Anthropic's clients name a request in their reports."""
    return {"x-request-id": reply.id, "request-id": reply.id}


def _writer(reply: Reply, *, include_usage: bool) -> EventWriter:
    if isinstance(reply, ResponsesReply):
        return ResponsesWriter(reply)
    if isinstance(reply, AnthropicReply):
        return AnthropicWriter(reply)
    return ChunkWriter(reply, include_usage=include_usage)


def _new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


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
        attempt=int(count) if count.isdecimal() and len(count) < _MOST_DIGITS else 0,
    )
