"""One agent's session: its turns, what they recorded, and its reward."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import fields
from typing import Any

import orjson

from torchrl_sglang.agents.conversation.trajectories import make_trajectories, sampled_tokens
from torchrl_sglang.agents.conversation.tree import Tree
from torchrl_sglang.agents.given_values import as_json_object, as_reward
from torchrl_sglang.agents.served_model import ServedModel
from torchrl_sglang.agents.sharing import PendingTurn, TurnRecord, TurnRecords
from torchrl_sglang.agents.turns import count_chat, sample_chat, sample_text
from torchrl_sglang.agents.types import (
    ChatRequest,
    OnProgress,
    SessionInfo,
    SessionStatus,
    TextRequest,
    Trajectory,
    Turn,
)
from torchrl_sglang.errors import SessionFinishedError, SGLangError, UnknownSessionError

__all__ = ["Session"]

Sampler = Callable[[OnProgress | None], Coroutine[Any, Any, TurnRecord]]


class Session:
    """The conversations of one run of an agent. Belongs to one event loop.

    A request that is repeated is not generated twice:

    * two requests with the same ``idempotency_key`` are one, whenever they come;
    * a request that equals one whose answer could not be delivered (:meth:`undelivered`) gets that answer, once;
    * a request that says that it is a retry (``attempt``) belongs to an equal request of an earlier attempt: first to
      one whose answer could not be delivered, then to one that failed, which is sampled anew; else it gets the answer
      to the last one that is under way, or is recorded and no conversation has gone on from it. Each request has one
      retry of each number, so equal requests that are sent side by side, and again, keep an answer each.

    Any other request is sampled anew, also an equal one: an agent may want several answers to one prompt. Answers with
    the same tokens from the same weights are one segment.

    Args:
        model: the served model.
        tags: what the one who made the session wants to find again in its trajectories.
        timeout_s: silence after which it expires; ``None`` is that of the settings.

    Attributes:
        id: names it.
        key: who has it may use the session.
        status: whether it takes requests.
    """

    def __init__(
        self, model: ServedModel, *, tags: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> None:
        self.id = f"ses_{secrets.token_hex(12)}"
        self.key = f"sk-{secrets.token_urlsafe(32)}"
        self.status: SessionStatus = "active"
        self._model = model
        self._tags = as_json_object("tags", tags)
        self._timeout_s = model.settings.session_timeout_s if timeout_s is None else timeout_s
        self._created_at = self._heard_at = time.monotonic()
        self._chats, self._texts = Tree(), Tree()
        self._records = TurnRecords()
        self._server: str | None = None
        self._is_deleted = False
        self._reward: float | None = None
        self._info: dict[str, Any] = {}
        self._last_error = ""

    # ------------------------------------------------------------------ turns

    async def chat(self, request: ChatRequest, on_progress: OnProgress | None = None) -> Turn:
        """The next message of a conversation.

        If the task is cancelled, and no retry waits for the same answer, the server's request is aborted and nothing is
        recorded.

        Args:
            request: the conversation and the settings.
            on_progress: called with what is generated, for streaming. A retry that joins a turn under way may get only
                its end; the returned turn has everything.

        Raises:
            ConfigError: something in the request can't be honoured; the session stays usable.
            ContextLengthError: the conversation is too long.
            SessionFinishedError: the session takes no more requests.
            UnknownSessionError: the session was deleted.
            OverloadedError: too many requests wait.
            ServerError: no server generated the answer.
        """
        return await self._turn(
            request,
            lambda report: sample_chat(request, self._model, self._chats, preferred=self._server, on_progress=report),
            on_progress,
        )

    async def count_tokens(self, request: ChatRequest) -> int:
        """The length of the prompt that :meth:`chat` would send; an image counts as one token or a few.

        Raises:
            ConfigError: something in the request can't be honoured.
            SessionFinishedError: the session takes no more requests.
            UnknownSessionError: the session was deleted.
        """
        self._require_active()
        self._heard_at = time.monotonic()
        return await count_chat(request, self._model, self._chats)

    async def complete(self, request: TextRequest, on_progress: OnProgress | None = None) -> Turn:
        """The continuation of a text or of token ids. Arguments and errors are those of :meth:`chat`."""
        return await self._turn(
            request,
            lambda report: sample_text(request, self._model, self._texts, preferred=self._server, on_progress=report),
            on_progress,
        )

    def undelivered(self, turn: Turn) -> None:
        """A turn's answer did not reach the client: an equal request will get it."""
        self._records.undelivered(turn)

    async def _turn(self, request: ChatRequest | TextRequest, sample: Sampler, on_progress: OnProgress | None) -> Turn:
        self._require_active()
        self._heard_at = time.monotonic()
        signature = _signature(request)
        known = self._records.find(signature, request.idempotency_key, attempt=request.attempt)
        if isinstance(known, TurnRecord):
            return self._records.delivered(known, is_repeated=True)
        joined = known is not None
        if known is None:
            known = PendingTurn(sample, streams=on_progress is not None)
            self._records.begin(known, signature, request.idempotency_key, attempt=request.attempt)
        try:
            record = await known.result(on_progress)
        except asyncio.CancelledError:
            if known.is_withdrawn:
                self._require_active()
            self._last_error = "its client closed the connection before the answer was complete, by a time-out perhaps"
            if (lost := known.untaken) is not None:  # it came at this moment, and nobody is there to take it
                self._records.lost(lost)
            raise
        except SGLangError as error:
            self._last_error = str(error)
            raise
        finally:
            self._heard_at = time.monotonic()
        self._last_error = ""
        self._server = record.server or self._server
        return self._records.delivered(record, is_repeated=joined, joins=True)

    def _require_active(self) -> None:
        if self._is_deleted:
            raise UnknownSessionError(f"session {self.id} was deleted; make a new session", session=self.id)
        if self.status == "active":
            return
        why = "it has its reward" if self.status == "finished" else f"nothing was heard of it for {self._timeout_s:g} s"
        raise SessionFinishedError(
            f"session {self.id} is {self.status}: {why}. It takes no more requests; make a new session", session=self.id
        )

    # ------------------------------------------------------------------ results

    def reward(self, value: float, info: Mapping[str, Any] | None = None) -> None:
        """Finish the session with a reward. Turns under way are aborted. Giving the same reward again does nothing.

        Args:
            value: the reward, a finite number, also NumPy's or torch's.
            info: anything else to know, as JSON.

        Raises:
            ConfigError: the reward is no finite number, or JSON can't hold the info.
            SessionFinishedError: the session has another reward, or has expired.
        """
        given = as_reward(value), as_json_object("info", info)
        if self.status == "finished" and (self._reward, self._info) == given:
            return
        self._require_active()
        self._reward, self._info = given
        self._end("finished")

    def trajectories(self) -> list[Trajectory]:
        """One trajectory per leaf: conversations first, then continued texts, each in the order of their recording."""
        about: dict[str, Any] = {
            "session": self.id,
            "reward": self._reward,
            "info": dict(self._info),
            "tags": dict(self._tags),
            "status": self.status,
        }
        chats = make_trajectories(self._chats, **about)
        return chats + make_trajectories(self._texts, first_index=len(chats), **about)

    def info(self) -> SessionInfo:
        """What it has done so far."""
        now = time.monotonic()
        return SessionInfo(
            id=self.id,
            status=self.status,
            turns=self._records.num_turns,
            trajectories=len(self._chats.leaves()) + len(self._texts.leaves()),
            sampled_tokens=sampled_tokens(self._chats) + sampled_tokens(self._texts),
            in_flight=self._records.num_pending,
            age_s=now - self._created_at,
            idle_s=self.idle_s,
            reward=self._reward,
            info=dict(self._info),
            tags=dict(self._tags),
            last_error=self._last_error,
        )

    # ------------------------------------------------------------------ its end

    @property
    def idle_s(self) -> float:
        """Seconds since the agent was last heard of; 0 while something is generated for it."""
        return 0.0 if self._records.num_pending else time.monotonic() - self._heard_at

    def expire_if_silent(self) -> bool:
        """Expire if the agent has been silent for too long; whether it did so now."""
        if self.status != "active" or self.idle_s <= self._timeout_s:
            return False
        self._end("expired")
        return True

    def close(self) -> None:
        """Abort what is under way, because the session is deleted."""
        self._is_deleted = True
        self._end("finished" if self.status == "active" else self.status)

    def _end(self, status: SessionStatus) -> None:
        self.status = status
        self._records.withdraw_all()


def _signature(request: ChatRequest | TextRequest) -> bytes:
    """Equal for requests that ask for the same, apart from what says that they are repeated, as 32 bytes."""
    asked = {f.name: getattr(request, f.name) for f in fields(request) if f.name not in ("idempotency_key", "attempt")}
    named = [type(request).__name__, asked]
    try:
        written = orjson.dumps(named, default=repr, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # keys that are no texts, integers of more than 64 bits, half of a surrogate pair
        written = json.dumps(named, sort_keys=True, default=repr).encode()
    return hashlib.sha256(written).digest()
