"""Routes of those who run agents: sessions, rewards, trajectories."""

from __future__ import annotations

import hmac
import math
from dataclasses import asdict
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from torchrl_sglang.agents.http.access import check_admin, key_of
from torchrl_sglang.agents.http.api_errors import ApiError, bad_request
from torchrl_sglang.agents.http.fields import Fields
from torchrl_sglang.agents.http.json_reply import JsonReply
from torchrl_sglang.agents.http.serving import Serving
from torchrl_sglang.agents.session import Session

__all__ = ["SessionRoutes"]


class SessionRoutes:
    """Answers requests about sessions.

    Args:
        serving: the sessions.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def create(self, request: Request) -> Response:
        """``POST /sessions {"tags": {...}, "ttl_s": 600}``: a new session; both fields may be left out."""
        check_admin(request, self._serving.admin_key)
        fields = Fields(await self._serving.body(request) or {})
        tags = fields.object("tags") or {}
        ttl_s = fields.number("ttl_s")
        fields.refuse_unread()
        session = self._serving.sessions.create(tags=tags, ttl_s=ttl_s)
        base_url = self._serving.base_url(session.id, str(request.base_url))
        return JsonReply({"id": session.id, "base_url": base_url, "api_key": session.key}, 201)

    async def index(self, request: Request) -> Response:
        """``GET /sessions?status=finished``: all sessions, for who has the gateway's key."""
        if self._serving.admin_key is None:
            raise ApiError(
                403, "this gateway has no key, so nobody sees the sessions of others: start it with one", code="no_key"
            )
        check_admin(request, self._serving.admin_key)
        status: Any = request.query_params.get("status")
        return JsonReply([asdict(each) for each in self._serving.sessions.infos(status)])

    async def about(self, request: Request) -> Response:
        """``GET /info``: what it serves."""
        check_admin(request, self._serving.admin_key)
        model = self._serving.sessions.model
        return JsonReply(
            {
                "model": self._serving.model,
                "tokenizer_path": model.pool.info.tokenizer_path,
                "revision": model.pool.info.revision,
                "weight_version": model.weight_version,
                "sessions": len(self._serving.sessions),
            }
        )

    def _session(self, request: Request) -> Session:
        """The session that a request names, for its key and for the gateway's."""
        admin_key = self._serving.admin_key
        if admin_key is not None and hmac.compare_digest(key_of(request).encode(), admin_key.encode()):
            return self._serving.sessions.get(request.path_params["session"])
        return self._serving.session(request)

    async def show(self, request: Request) -> Response:
        """``GET /sessions/ID``: its status and counts."""
        return JsonReply(asdict(self._session(request).info()))

    async def delete(self, request: Request) -> Response:
        """``DELETE /sessions/ID``: end its requests, and forget it."""
        session = self._session(request)
        await self._serving.sessions.delete(session.id)
        return JsonReply({"id": session.id, "deleted": True})

    async def reward(self, request: Request) -> Response:
        """``POST /sessions/ID/reward {"reward": 1.0, "info": {...}}``: the session is finished."""
        session = self._session(request)
        fields = Fields(await self._serving.body(request))
        reward = fields.number("reward")
        if reward is None or not math.isfinite(reward):
            raise bad_request("reward is missing: send a number", "reward", "missing_required_parameter")
        info: dict[str, Any] = fields.object("info") or {}
        fields.refuse_unread()
        session.reward(float(reward), info)
        return JsonReply(asdict(session.info()))

    async def trajectories(self, request: Request) -> Response:
        """``GET /sessions/ID/trajectories``: what it has recorded, one entry per leaf of its tree."""
        leaves = self._session(request).trajectories()
        # In a thread: long conversations are millions of characters, and other agents wait for the event loop.
        return await run_in_threadpool(lambda: JsonReply([leaf.as_json() for leaf in leaves]))
