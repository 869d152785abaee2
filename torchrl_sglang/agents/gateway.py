"""``AgentGateway``: speaks OpenAI's API to agents, and token ids to the servers."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import torchrl_sglang.agents.available  # noqa: F401  names the extra if a package is missing
from torchrl_sglang.agents.http.access import is_loopback
from torchrl_sglang.agents.http.app import make_app
from torchrl_sglang.agents.http.server_thread import ServerThread
from torchrl_sglang.agents.http.serving import Serving
from torchrl_sglang.agents.http.token_texts import TokenTexts
from torchrl_sglang.agents.open_files import RESERVE, warn_of_low_limit
from torchrl_sglang.agents.served_model import ServedModel
from torchrl_sglang.agents.session import Session
from torchrl_sglang.agents.sessions import Sessions
from torchrl_sglang.agents.settings import SessionSettings
from torchrl_sglang.agents.types import SessionInfo, SessionStatus, Trajectory
from torchrl_sglang.chat.tool_parsers import template_text
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.config.checking import require_number
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.resolve import Servers, resolve_pool

__all__ = ["AgentGateway", "AgentSession"]

T = TypeVar("T")

_EXPIRE_EVERY_S = 1.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSession:
    """What an agent needs: give ``base_url`` and ``api_key`` to its OpenAI client.

    Attributes:
        id: names the session.
        base_url: the address of its API.
        api_key: its key.
    """

    id: str
    base_url: str
    api_key: str = field(repr=False)


class AgentGateway:
    """An OpenAI-compatible server for agents in front of SGLang servers, which records every token.

    It runs in a thread of its own with its own event loop. Agents may be any program with an OpenAI client: they get a
    session's ``base_url`` and ``api_key``. Whoever trains reads the session's trajectories: the token ids that were
    sent to and sampled by the model, with their log-probs and weight versions.

    The methods may be called from any thread. Sessions expire when their agents are silent
    (:class:`~torchrl_sglang.SessionSettings`).

    Args:
        servers: the servers: an :class:`~torchrl_sglang.AsyncSGLang`, an :class:`~torchrl_sglang.SGLangPool`, or URLs.
        tokenizer: the model's tokenizer; by default loaded from the server's ``tokenizer_path``.
        host: address to listen on. Other machines reach ``"0.0.0.0"``, which needs an ``admin_key``.
        port: port to listen on; 0 for any free port.
        admin_key: the key with which ``POST /sessions`` makes sessions; ``None`` needs none, on this machine only.
        public_url: the gateway's address as agents see it, behind a proxy or on another machine.
        max_body_bytes: largest request; larger ones are refused before they are read.
        settings: sampling defaults, chat template, expiry and limits of sessions.
        client: time-outs and keys of ``servers`` that are given as URLs.

    Attributes:
        sessions: the store of sessions, which belongs to the gateway's event loop.

    Raises:
        ConfigError: a bad argument, a port in use, a model without a chat template.
        ServerError: a server can't be reached.

    Examples:
        An agent in the same program::

            from openai import OpenAI

            with AgentGateway(servers) as gateway:
                session = gateway.create_session(tags={"task": 7})
                client = OpenAI(base_url=session.base_url, api_key=session.api_key)
                client.chat.completions.create(model="any", messages=[{"role": "user", "content": "Hi"}])
                gateway.reward(session.id, 1.0)
                for trajectory in gateway.trajectories(session.id):
                    print(len(trajectory.token_ids), sum(trajectory.loss_mask), trajectory.reward)
    """

    def __init__(
        self,
        servers: Servers,
        *,
        tokenizer: Any = None,
        host: str = "127.0.0.1",
        port: int = 0,
        admin_key: str | None = None,
        public_url: str | None = None,
        max_body_bytes: int = 64 * 2**20,
        settings: SessionSettings | None = None,
        client: ClientConfig | None = None,
    ) -> None:
        _check_access(host, admin_key)
        require_number("port", port, whole=True, at_least=0, at_most=65535)
        require_number("max_body_bytes", max_body_bytes, whole=True, at_least=1024)
        self._host = host
        self._public_url = _checked_url(public_url)
        self._model = ServedModel(resolve_pool(servers, client), tokenizer, settings)
        self.sessions = Sessions(self._model)
        serving = Serving(
            sessions=self.sessions,
            model=str(self._model.pool.info.raw.get("served_model_name") or self._model.pool.info.model_path),
            token_texts=TokenTexts(self._model.tokenizer),
            admin_key=admin_key,
            public_url=self._public_url,
            max_body_bytes=max_body_bytes,
            template=self._model.settings.chat_template or template_text(self._model.tokenizer),
            context_length=self._model.pool.context_length,
            leaves_out_effort=self._model.settings.leaves_out_effort,
        )
        self._server = ServerThread(_application(serving, self.sessions), host=host, port=port)
        self._stop_at_exit: Callable[[], Any] = weakref.finalize(self, self._server.stop)

    # ------------------------------------------------------------------ start and end

    def start(self) -> AgentGateway:
        """Serve agents; returns when requests are answered."""
        warn_of_low_limit()
        self._server.start()
        return self

    def close(self) -> None:
        """Abort all turns, close all connections, and forget the sessions. The servers keep running."""
        self._stop_at_exit()

    def __enter__(self) -> AgentGateway:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.port

    @property
    def url(self) -> str:
        """Its address, without a session: ``public_url`` where that is given."""
        if self._public_url is not None:
            return self._public_url
        host = _ANY_ADDRESS.get(self._host, f"[{self._host}]" if ":" in self._host else self._host)
        return f"http://{host}:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether it serves agents."""
        return self._server.is_alive

    @property
    def weight_version(self) -> int:
        """The newest weights on the servers, as far as is known: sent by this process, or seen in answers."""
        return self._model.weight_version

    def uses(self, pool: SGLangPool) -> bool:
        """Whether it generates through this very pool, and so with the adapter that was sent through it."""
        return self._model.pool is pool

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens."""
        text: str = self._model.tokenizer.decode(token_ids)
        return text

    # ------------------------------------------------------------------ sessions

    def create_session(self, *, tags: Mapping[str, Any] | None = None, ttl_s: float | None = None) -> AgentSession:
        """Make a session for one run of an agent.

        Args:
            tags: anything to find again in its trajectories, as JSON.
            ttl_s: seconds of silence after which it expires; ``None`` is ``SessionSettings.session_timeout_s``.

        Raises:
            ConfigError: a bad argument.
            OverloadedError: there are as many sessions as may be.
        """
        session = self._call(lambda: self.sessions.create(tags=tags, ttl_s=ttl_s))
        return AgentSession(id=session.id, base_url=f"{self.url}/sessions/{session.id}/v1", api_key=session.key)

    def get(self, session_id: str) -> SessionInfo:
        """A session's status and counts.

        Raises:
            UnknownSessionError: there is none of this id.
        """
        return self._of(session_id, Session.info)

    def list_sessions(self, status: SessionStatus | None = None) -> list[SessionInfo]:
        """All sessions that are kept, oldest first; with ``status`` those of this status."""
        return self._call(lambda: self.sessions.infos(status))

    def reward(self, session_id: str, value: float, info: Mapping[str, Any] | None = None) -> SessionInfo:
        """Finish a session with its reward; turns under way are aborted.

        Args:
            session_id: the session.
            value: a finite number, also NumPy's or torch's.
            info: anything else to know, as JSON.

        Raises:
            ConfigError: the reward is no finite number, or JSON can't hold the info.
            UnknownSessionError: there is none of this id.
            SessionFinishedError: it has another reward, or has expired.
        """

        def finish(session: Session) -> SessionInfo:
            session.reward(value, info)
            return session.info()

        return self._of(session_id, finish)

    def trajectories(self, session_id: str) -> list[Trajectory]:
        """What a session has recorded: one trajectory per leaf of its tree.

        Raises:
            UnknownSessionError: there is none of this id.
        """
        return self._of(session_id, Session.trajectories)

    def delete(self, session_id: str) -> None:
        """Abort what a session has under way, and forget it.

        Raises:
            UnknownSessionError: there is none of this id.
        """
        self._server.call(lambda: self.sessions.delete(session_id))

    def _of(self, session_id: str, read: Callable[[Session], T]) -> T:
        return self._call(lambda: read(self.sessions.get(session_id)))

    def _call(self, work: Callable[[], T]) -> T:
        """Run a function in the gateway's event loop, to which the sessions belong."""

        async def run() -> T:
            return work()

        return self._server.call(run)


def _application(serving: Serving, sessions: Sessions) -> Callable[[], Any]:
    """What :class:`ServerThread` starts: the application, and its end. Holds no gateway, so that one can be freed."""

    async def start() -> tuple[Any, Callable[[], Any]]:
        RESERVE.fill()
        expiring = asyncio.get_running_loop().create_task(_expire(sessions))

        async def end() -> None:
            expiring.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await expiring
            RESERVE.empty()
            await sessions.close()

        return make_app(serving), end

    return start


async def _expire(sessions: Sessions) -> None:
    while True:
        await asyncio.sleep(_EXPIRE_EVERY_S)
        sessions.expire()
        sessions.model.close_departed()
        RESERVE.fill()


def _check_access(host: str, admin_key: str | None) -> None:
    if not isinstance(host, str):
        raise ConfigError(f"host must be a string, got {host!r}")
    if admin_key is not None and (not isinstance(admin_key, str) or not admin_key.strip()):
        raise ConfigError("admin_key must be a non-empty string")
    if admin_key is None and not is_loopback(host):
        raise ConfigError(
            f"host={host!r} can be reached from other machines: give an admin_key, with which sessions are made, or "
            "listen on 127.0.0.1"
        )


def _checked_url(public_url: str | None) -> str | None:
    if public_url is None:
        return None
    if not isinstance(public_url, str) or not public_url.startswith(("http://", "https://")):
        raise ConfigError(f"public_url must begin with http:// or https://, got {public_url!r}")
    return public_url.rstrip("/")
