"""Sessions that answer from a script and keep what they were asked: the HTTP interface is tested on them alone."""

from __future__ import annotations

import asyncio
import hmac
from collections import deque
from collections.abc import Mapping
from typing import Any

import httpx
from starlette.types import ASGIApp

from torchrl_sglang.agents.http.app import make_app
from torchrl_sglang.agents.http.serving import Serving
from torchrl_sglang.agents.http.token_texts import TokenTexts
from torchrl_sglang.agents.types import (
    ChatRequest,
    Choice,
    OnProgress,
    Progress,
    SessionInfo,
    TextRequest,
    TokenLogProb,
    Trajectory,
    Turn,
)
from torchrl_sglang.errors import SessionKeyError, UnknownSessionError


def make_choice(
    index: int = 0,
    *,
    content: str | None = "Hello there",
    calls: tuple[tuple[str, str], ...] = (),
    reasoning: str = "",
    ids: tuple[int, ...] = (72, 105),
    finish_reason: Any = None,
    stop: str | None = None,
    top: tuple[tuple[TokenLogProb, ...], ...] = (),
) -> Choice:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": f"call{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ]
    return Choice(
        index=index,
        message=message,
        text=(reasoning + (content or "")),
        token_ids=ids,
        log_probs=tuple(-0.5 for _ in ids),
        weight_versions=tuple(3 for _ in ids),
        finish_reason=finish_reason or ("tool_calls" if calls else "stop"),
        top_log_probs=top,
        stop=stop,
    )


def make_turn(*choices: Choice) -> Turn:
    chosen = choices or (make_choice(),)
    return Turn(
        id="turn-1",
        choices=chosen,
        prompt_tokens=10,
        completion_tokens=sum(len(choice.token_ids) for choice in chosen),
        cached_tokens=4,
    )


class StandInSession:
    """One session. ``answers`` holds turns, or errors that are raised; without one it answers ``Hello there``."""

    def __init__(self, name: str) -> None:
        self.id = name
        self.key = f"key-of-{name}"
        self.requests: list[ChatRequest | TextRequest] = []
        self.answers: deque[Turn | BaseException] = deque()
        self.cancelled = 0
        self.not_delivered: list[str] = []
        self.hang = False
        self.fail_after: BaseException | None = None
        self.given_reward: float | None = None

    async def chat(self, request: ChatRequest | TextRequest, report: OnProgress | None = None) -> Turn:
        self.requests.append(request)
        answer = self.answers.popleft() if self.answers else make_turn()
        if isinstance(answer, BaseException):
            raise answer
        try:
            for choice in answer.choices:
                await self._report(choice, report)
            if self.fail_after is not None:
                raise self.fail_after
            if self.hang:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return answer

    complete = chat

    def undelivered(self, turn: Turn) -> None:
        self.not_delivered.append(turn.id)

    @staticmethod
    async def _report(choice: Choice, report: OnProgress | None) -> None:
        content, reasoning = choice.message.get("content") or "", choice.message.get("reasoning_content") or ""
        count = len(choice.token_ids)
        for at in range(count):
            if report is not None:

                def share(text: str, at: int = at) -> str:
                    return text[len(text) * at // (count + 1) : len(text) * (at + 1) // (count + 1)]

                report(
                    Progress(
                        index=choice.index,
                        text=share(choice.text),
                        content=share(content),
                        reasoning_content=reasoning if at == 0 else "",
                        token_ids=choice.token_ids[at : at + 1],
                        log_probs=choice.log_probs[at : at + 1],
                        top_log_probs=choice.top_log_probs[at : at + 1],
                    )
                )
            await asyncio.sleep(0)

    def reward(self, value: float, info: Mapping[str, Any]) -> None:
        self.given_reward = value
        self.info_given = info

    def info(self) -> SessionInfo:
        return SessionInfo(
            id=self.id,
            status="active" if self.given_reward is None else "finished",
            turns=len(self.requests),
            trajectories=1,
            sampled_tokens=2,
            in_flight=0,
            age_s=1.0,
            idle_s=0.5,
            reward=self.given_reward,
        )

    def trajectories(self) -> list[Trajectory]:
        return [
            Trajectory(
                token_ids=(1, 2, 3),
                loss_mask=(0, 1, 1),
                log_probs=(0.0, -0.5, -0.25),
                weight_versions=(-1, 3, 3),
                finish_reason="stop",
                messages=({"role": "user", "content": "Hi"},),
                parent=None,
            )
        ]


class StandInSessions:
    """The sessions, by id: ``s1``, ``s2``..."""

    def __init__(self) -> None:
        self.made: dict[str, StandInSession] = {}
        self.created_with: list[dict[str, Any]] = []

    def create(self, **settings: Any) -> StandInSession:
        self.created_with.append(settings)
        session = StandInSession(f"s{len(self.created_with)}")
        self.made[session.id] = session
        return session

    def get(self, name: str, *, key: str | None = None) -> StandInSession:
        if name not in self.made:
            raise UnknownSessionError(f"there is no session {name!r}", session=name)
        if key is not None and not hmac.compare_digest(key.encode(), self.made[name].key.encode()):
            raise SessionKeyError("wrong key", session=name)
        return self.made[name]

    async def delete(self, name: str) -> None:
        del self.made[name]


class ByteTokenizer:
    """A tokenizer whose tokens are the characters of their number."""

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return chr(token_id)


class StandInGateway:
    """An application on scripted sessions, with one session, and a client that needs no socket."""

    def __init__(self, **settings: Any) -> None:
        self.sessions = StandInSessions()
        self.app: ASGIApp = make_app(
            Serving(
                **{
                    "sessions": self.sessions,
                    "model": "tiny",
                    "token_texts": TokenTexts(ByteTokenizer()),
                    "max_body_bytes": 10_000,
                    **settings,
                }
            )
        )
        self.session = self.sessions.create()
        self.url = f"http://localhost/sessions/{self.session.id}/v1"

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False)

    def send(
        self, path: str, body: Any = None, *, method: str = "POST", key: str | None = "", **more: Any
    ) -> httpx.Response:
        """One request under the session's address, with its key unless another one (or ``None``) is given."""
        headers = dict(more.pop("headers", {}))
        if key is not None:
            headers["authorization"] = f"Bearer {key or self.session.key}"
        content = {"content": body} if isinstance(body, bytes) else {} if body is None else {"json": body}

        async def run() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, headers=headers, **content, **more)

        return asyncio.run(run())

    def chat(self, **fields: Any) -> httpx.Response:
        """A chat request with these fields."""
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
        return self.send(f"/sessions/{self.session.id}/v1/chat/completions", body)
