"""Runs an agent once in a session of its own, and reads what the session has recorded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torchrl_sglang.agents.collector.clean_up import until_done
from torchrl_sglang.agents.collector.failures import RunFailedError, RunFailure
from torchrl_sglang.agents.collector.rewards import Reward
from torchrl_sglang.agents.collector.rows import Role, RowReward, Run, make_run, trained_trajectories
from torchrl_sglang.agents.collector.runners import Returned, Runner, in_own_thread
from torchrl_sglang.agents.collector.task_stream import NumberedTask
from torchrl_sglang.agents.collector.task_texts import own_copy
from torchrl_sglang.agents.gateway import AgentGateway, AgentSession
from torchrl_sglang.agents.remote_gateway import RemoteGateway
from torchrl_sglang.agents.types import SessionInfo, Trajectory
from torchrl_sglang.errors import OverloadedError, SessionError, SGLangError, UnknownSessionError

__all__ = ["SessionRuns"]

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_GRACE_S = 60.0
_SHOWN_ERROR = 2000


class SessionRuns:
    """Runs one agent, each time in a new session, which is deleted afterwards. Belongs to one event loop.

    Args:
        gateway: makes the sessions.
        runner: runs the agent.
        timeout_s: longest time of a run.
        grace_s: a session outlives this time by so much, so that the time-out is what ends a silent run.
        row_reward: the reward of one trajectory; ``None``: that of its run.
        role: the role of one trajectory; ``None``: all have the same.
    """

    def __init__(
        self,
        gateway: AgentGateway | RemoteGateway,
        runner: Runner,
        *,
        timeout_s: float,
        grace_s: float = _GRACE_S,
        row_reward: RowReward | None = None,
        role: Role | None = None,
    ) -> None:
        self._gateway = gateway
        self._runner = runner
        self._timeout_s = timeout_s
        self._row_reward, self._role = row_reward, role
        self._longest_s = timeout_s + grace_s
        self._has_warned = False
        self._made_at = 0.0

    async def run(self, task: NumberedTask, member: int) -> Run | RunFailure:
        """Run the agent once for a task, as the member of this number of its group."""
        try:
            session = await self._session(task, member)
        except RunFailedError as error:
            return RunFailure(kind=error.kind, message=str(error), group_id=task.number, member=member)
        try:
            returned = await self._within_time(self._runner(own_copy(task.task), session.base_url, session.api_key))
            return await self._recorded(session, returned)
        except (RunFailedError, SessionError) as error:  # an agent may have deleted its own session
            kind = error.kind if isinstance(error, RunFailedError) else "gateway"
            message = (str(error) + await self._told(session)).replace(session.api_key, "***")
            return RunFailure(kind=kind, message=message, group_id=task.number, member=member, session=session.id)
        finally:
            await self._delete(session)

    async def _told(self, session: AgentSession) -> str:
        """Why the gateway did not answer its last request: many clients tell the status alone."""
        try:
            info = await _called(lambda: self._gateway.get(session.id))
        except (SGLangError, RuntimeError):  # it is deleted, or the gateway is closed
            return ""
        return f". The gateway had told it: {info.last_error}" if info.last_error else ""

    async def _session(self, task: NumberedTask, member: int) -> AgentSession:
        """A new session; waits while the gateway keeps as many as it may.

        Raises:
            RunFailedError: no run has got one for longer than a run takes.
        """
        begun_at = time.monotonic()
        tags = {"group_id": task.number, "member": member}
        make = partial(self._gateway.create_session, tags=tags, ttl_s=self._longest_s)
        while True:
            making = asyncio.ensure_future(_called(make))
            try:
                await until_done([making])
            except asyncio.CancelledError:
                with contextlib.suppress(SGLangError, RuntimeError):
                    await self._delete(making.result())
                raise
            try:
                session = making.result()
            except OverloadedError as error:
                if time.monotonic() - max(begun_at, self._made_at) > self._longest_s:
                    raise RunFailedError(
                        "gateway",
                        f"the gateway made no session for {self._longest_s:g} s ({error}): delete those that "
                        "nobody uses, or raise SessionSettings.max_sessions above the collector's concurrency",
                    ) from error
                await asyncio.sleep(error.retry_after_s)
            else:
                self._made_at = time.monotonic()
                return session

    async def _within_time(self, work: Awaitable[Returned]) -> Returned:
        """What the agent returned.

        Raises:
            RunFailedError: it raised, or took too long.
        """
        running = asyncio.ensure_future(work)
        running.add_done_callback(_read_error)
        try:
            done, _ = await asyncio.wait({running}, timeout=self._timeout_s)
            if not done:
                raise RunFailedError("timeout", f"the agent had not ended after timeout_s={self._timeout_s:g} s")
            if running.cancelled():
                raise RunFailedError("error", "the agent's task was cancelled by the agent itself")
            error = running.exception()
            if error is None:
                return running.result()
            if isinstance(error, RunFailedError):
                raise error
            raise RunFailedError("error", _described(error)) from error
        finally:
            if not running.done():
                running.cancel()
                # an agent may clean up, but not hold up the others; also if the run is given up meanwhile
                await until_done([asyncio.ensure_future(asyncio.wait({running}, timeout=_CLEAN_UP_S))])

    async def _recorded(self, session: AgentSession, returned: Returned) -> Run:
        """The finished session.

        Raises:
            RunFailedError: it has no reward or two, has expired, or has sampled nothing.
        """
        info = await _called(lambda: self._gateway.get(session.id))
        reward = _reward(info, returned)
        if info.status == "active":
            await _called(lambda: self._gateway.reward(session.id, reward.value, reward.info))
        trajectories = await _called(lambda: self._gateway.trajectories(session.id))
        trained = trained_trajectories(trajectories)
        if not trained:
            raise RunFailedError(
                "no requests",
                "the agent got no answer through the gateway, so there is nothing to train on: its client must use the "
                "base_url and the api_key of its run",
            )
        if not self._has_warned and not all(trajectory.exact_log_probs for trajectory in trained):
            self._has_warned = True
            _log.warning(
                "the agent asks for top_p, top_k or min_p: tokens are drawn from a truncated distribution, and the "
                "recorded log-probs are those before truncation (generation.exact_log_probs is False)"
            )
        return await self._rated(session, trained, reward)

    async def _rated(self, session: AgentSession, trained: Sequence[Trajectory], reward: Reward) -> Run:
        """The run with the rewards and roles of its rows, in a thread: the functions are the user's.

        Raises:
            RunFailedError: one of them raised, gave no finite number, or took too long.
        """
        make = partial(make_run, session.id, trained, reward, row_reward=self._row_reward, role=self._role)
        if self._row_reward is None and self._role is None:
            return make()
        rating = asyncio.ensure_future(in_own_thread(make))
        rating.add_done_callback(_read_error)
        try:
            done, _ = await asyncio.wait({rating}, timeout=self._timeout_s)
        finally:
            rating.cancel()  # changes nothing once it is done
        if not done:
            raise RunFailedError("timeout", f"row_reward or role had not ended after timeout_s={self._timeout_s:g} s")
        error = rating.exception()
        if error is not None:
            what = str(error) if isinstance(error, RunFailedError) else _described(error)
            raise RunFailedError("bad reward", f"row_reward or role failed: {what}") from error
        rated: Run = rating.result()
        return rated

    async def _delete(self, session: AgentSession) -> None:
        """Forget the session, which aborts what it still generates; also while this run is given up."""
        deleting = asyncio.ensure_future(_called(lambda: self._gateway.delete(session.id)))
        await until_done([deleting])
        # RuntimeError: the gateway is closed, and has forgotten all sessions
        with contextlib.suppress(UnknownSessionError, RuntimeError):
            deleting.result()


_CLEAN_UP_S = 5.0


def _read_error(running: asyncio.Future[Any]) -> None:
    """Else asyncio logs the error of a run that ended while its group was given up."""
    if not running.cancelled():
        running.exception()


async def _called(work: Callable[[], _Result]) -> _Result:
    """A call of the gateway, which waits for the gateway's event loop, in a thread."""
    return await asyncio.to_thread(work)


def _reward(info: SessionInfo, returned: Returned) -> Reward:
    if info.status == "expired":
        raise RunFailedError("expired", "its session expired: nothing was heard of the agent for too long")
    if info.status == "finished":
        assert info.reward is not None
        posted = Reward(value=info.reward, info=info.info)
        return _joined(posted, returned) if isinstance(returned, Reward) else posted
    if not isinstance(returned, Reward):
        hint = "" if returned is None else returned.hint
        raise RunFailedError(
            "no reward",
            "the agent ended without a reward: return it, print it in the last line, or POST it to .../reward" + hint,
        )
    return returned


def _joined(posted: Reward, returned: Reward) -> Reward:
    """A reward that was posted and returned, with what both say about the run."""
    if returned.value != posted.value:
        raise RunFailedError(
            "bad reward",
            f"the agent returned {returned.value:g} after {posted.value:g} was posted: give a run one reward",
        )
    unlike = [key for key in posted.info if key in returned.info and posted.info[key] != returned.info[key]]
    if unlike:
        raise RunFailedError("bad reward", f"the agent returned another info[{unlike[0]!r}] than it had posted")
    return Reward(value=posted.value, info={**posted.info, **returned.info})


def _described(error: BaseException) -> str:
    """The error, its cause and where the agent raised it. Of several that were raised together, the first."""
    while inner := _grouped(error):
        error = inner[0]
    if isinstance(error, SGLangError):
        return f"{type(error).__name__}: {error}"
    where = traceback.extract_tb(error.__traceback__)
    last = f" (line {where[-1].lineno} of {where[-1].name})" if where else ""
    cause = f", caused by {type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ is not None else ""
    return f"{type(error).__name__}: {error}"[:_SHOWN_ERROR] + cause[:_SHOWN_ERROR] + last


def _grouped(error: BaseException) -> tuple[BaseException, ...]:
    """The errors of an exception group, which Python 3.10 does not have: there it is one of a package."""
    inner = getattr(error, "exceptions", ())
    return inner if isinstance(inner, tuple) and inner and isinstance(inner[0], BaseException) else ()
