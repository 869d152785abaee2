"""Routes of those who run agents: sessions, rewards, trajectories."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from torchrl_sglang.agents.http.access import check_admin
from torchrl_sglang.agents.http.api_errors import bad_request
from torchrl_sglang.agents.http.fields import Fields
from torchrl_sglang.agents.http.json_reply import JsonReply
from torchrl_sglang.agents.http.serving import Serving

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

    async def show(self, request: Request) -> Response:
        """``GET /sessions/ID``: its status and counts."""
        return JsonReply(asdict(self._serving.session(request).info()))

    async def delete(self, request: Request) -> Response:
        """``DELETE /sessions/ID``: end its requests, and forget it."""
        session = self._serving.session(request)
        await self._serving.sessions.delete(session.id)
        return JsonReply({"id": session.id, "deleted": True})

    async def reward(self, request: Request) -> Response:
        """``POST /sessions/ID/reward {"reward": 1.0, "info": {...}}``: the session is finished."""
        session = self._serving.session(request)
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
        leaves = self._serving.session(request).trajectories()
        # In a thread: long conversations are millions of characters, and other agents wait for the event loop.
        return await run_in_threadpool(lambda: JsonReply([leaf.as_json() for leaf in leaves]))
