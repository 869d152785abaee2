"""A gateway over HTTP whose model answers what a function says, for programs that are agents.

Real clients talk to it as to a gateway before servers: sessions, template, parsing of calls and recording are the real
ones. Only the tokens come from a script, in the form of a Qwen3 model's answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.agent_kit import ScriptedGenerator, check_parents, check_recorded, says, scripted
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang.agents.http.app import make_app
from torchrl_sglang.agents.http.server_thread import ServerThread
from torchrl_sglang.agents.http.serving import Serving
from torchrl_sglang.agents.http.token_texts import TokenTexts
from torchrl_sglang.agents.types import SessionInfo, Trajectory

_TEMPLATE = TEMPLATES["thinking"].source
_END = "<|im_end|>"
_CONTEXT = 2_000_000
"""Tokens. The tokenizer makes one of a letter or two, and agents bring hundreds of kilobytes of tools."""


def calls(name: str, **arguments: Any) -> str:
    """A tool call as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@dataclass
class Seen:
    """A request that came, and the status of its answer."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes = b""
    status: int = 0
    answer: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else None


@dataclass
class ScriptedGateway:
    """Serves agents while it is open.

    Args:
        answer: called with the prompt's text; returns the model's answer.
        settings: of the sessions.

    Attributes:
        seen: all requests.
        model: the scripted generator, which knows what was sampled.
    """

    answer: Callable[[str], str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    template: str = _TEMPLATE
    seen: list[Seen] = field(default_factory=list)

    def __enter__(self) -> ScriptedGateway:
        tokenizer = make_tokenizer("byte-level BPE", self.template)

        def sample(ids: list[int]) -> Any:
            return says(tokenizer, self.answer(tokenizer.decode(ids)), _END)

        self.tokenizer = tokenizer
        self.sessions, self.model = scripted(tokenizer, sample, **self.settings)
        self._widen()
        serving = Serving(
            sessions=self.sessions,
            model="tiny",
            token_texts=TokenTexts(tokenizer),
            max_body_bytes=64 * 2**20,
            template=self.template,
        )

        async def start() -> tuple[Any, Any]:
            return _Recorder(make_app(serving), self.seen), self.sessions.close

        self._server = ServerThread(start, host="127.0.0.1", port=0)
        self._server.start()
        return self

    def _widen(self) -> None:
        pool: Any = self.sessions.model.pool
        pool.context_length, pool.max_prompt_tokens = _CONTEXT, _CONTEXT - 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop()

    def session(self) -> tuple[str, str, str]:
        """A new session: its id, its address and its key."""

        async def make() -> tuple[str, str]:
            made = self.sessions.create()
            return made.id, made.key

        name, key = self._server.call(make)
        return name, f"http://127.0.0.1:{self._server.port}/sessions/{name}/v1", key

    def recorded(self, session: str) -> tuple[list[Trajectory], SessionInfo]:
        """What a session has recorded, which is exactly what was sent and sampled."""

        async def read() -> tuple[list[Trajectory], SessionInfo]:
            found = self.sessions.get(session)
            return found.trajectories(), found.info()

        trajectories, info = self._server.call(read)
        check_recorded(trajectories, self._calls_of(trajectories))
        check_parents(trajectories, info.sampled_tokens)
        return trajectories, info

    def refused(self) -> list[Seen]:
        """The requests that were answered with an error."""
        return [each for each in self.seen if each.status >= 400]

    def _calls_of(self, trajectories: list[Trajectory]) -> list[Any]:
        generator: ScriptedGenerator = self.model
        whole = [each.token_ids for each in trajectories]
        return [call for call in generator.calls if any(ids[: len(call[0])] == call[0] for ids in whole)]


class _Recorder:
    """Notes what passes through an application."""

    def __init__(self, app: ASGIApp, seen: list[Seen]) -> None:
        self._app = app
        self._seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        query = scope["query_string"].decode()
        one = Seen(scope.get("method", scope["type"]), scope["path"], query, headers)
        self._seen.append(one)

        async def received() -> Message:
            message = await receive()
            one.body += message.get("body", b"")
            return message

        async def sent(message: Message) -> None:
            one.status = message.get("status", one.status)
            one.answer += message.get("body", b"")
            await send(message)

        await self._app(scope, received, sent)
