"""The sessions of a gateway: made, found by id and key, expired when silent, bounded in number."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from torchrl_sglang.agents.served_model import ServedModel
from torchrl_sglang.agents.session import Session
from torchrl_sglang.agents.types import SessionInfo, SessionStatus
from torchrl_sglang.config.checking import require, require_number
from torchrl_sglang.errors import ConfigError, OverloadedError, SessionKeyError, UnknownSessionError

__all__ = ["Sessions"]

_log = logging.getLogger(__name__)


class Sessions:
    """The sessions of one gateway. Belongs to one event loop.

    Args:
        model: the served model.
        on_expired: called with each session that expires, besides the warning in the log.
    """

    def __init__(self, model: ServedModel, *, on_expired: Callable[[Session], None] | None = None) -> None:
        self.model = model
        self._on_expired = on_expired
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def create(self, *, tags: Mapping[str, Any] | None = None, ttl_s: float | None = None) -> Session:
        """Make a session.

        Args:
            tags: anything to find again in its trajectories, as JSON.
            ttl_s: seconds of silence after which it expires; ``None`` is ``SessionSettings.session_timeout_s``.

        Raises:
            ConfigError: a bad argument.
            OverloadedError: there are as many sessions as may be.
        """
        require_number("ttl_s", ttl_s, optional=True, above=0)
        most = self.model.settings.max_sessions
        if len(self._sessions) >= most:
            self.expire()
            old = next((session for session in self._sessions.values() if session.status == "expired"), None)
            if old is None:
                raise OverloadedError(
                    f"there are {most} sessions, as many as may be (max_sessions): delete sessions whose trajectories "
                    "have been read"
                )
            _log.warning("the expired session %s is deleted to make room", old.id)
            del self._sessions[old.id]
        session = Session(self.model, tags=tags, timeout_s=ttl_s)
        self._sessions[session.id] = session
        return session

    def get(self, session_id: str, *, key: str | None = None) -> Session:
        """A session by its id.

        Args:
            session_id: its id.
            key: the key that came with a request; ``None`` is for callers who need none.

        Raises:
            ConfigError: the id is no string.
            UnknownSessionError: there is none.
            SessionKeyError: the key is missing or wrong.
        """
        if not isinstance(session_id, str):
            raise ConfigError(f"a session is named by its id, a string such as session.id; got {session_id!r:.100}")
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSessionError(
                f"there is no session {session_id!r:.100}: it was deleted, or never made", session=session_id[:100]
            )
        if key is not None and not hmac.compare_digest(key.encode(errors="replace"), session.key.encode()):
            what = "no key was sent" if not key else "the key that was sent is another one"
            raise SessionKeyError(
                f"{what}: session {session_id} needs the api_key that it was made with, as 'Authorization: Bearer KEY'",
                session=session_id,
            )
        self._expire(session)
        return session

    def infos(self, status: SessionStatus | None = None) -> list[SessionInfo]:
        """What the sessions have done so far, oldest first.

        Args:
            status: only those of this status.

        Raises:
            ConfigError: there is no such status.
        """
        known = get_args(SessionStatus)
        require(status is None or status in known, f"status must be {', '.join(known)}, got {status!r:.40}")
        self.expire()
        return [session.info() for session in self if status in (None, session.status)]

    async def delete(self, session_id: str) -> None:
        """Abort what a session has under way, and forget it.

        Raises:
            UnknownSessionError: there is none.
        """
        self.get(session_id).close()
        del self._sessions[session_id]

    def expire(self) -> list[Session]:
        """Expire the sessions that have been silent for too long; those that expired now. To be called regularly."""
        return [session for session in self._sessions.values() if self._expire(session)]

    def _expire(self, session: Session) -> bool:
        if not session.expire_if_silent():
            return False
        _log.warning("session %s expired: its agent was silent for %.0f s", session.id, session.idle_s)
        if self._on_expired is not None:
            self._on_expired(session)
        return True

    async def close(self) -> None:
        """Abort everything under way, and close the connections to the servers."""
        for session in self:
            session.close()
        await self.model.close()
