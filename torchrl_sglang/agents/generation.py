"""Generates one sequence: waits for a server, continues what a weight update aborted, and leaves a server that dies.

Shapes: ``P`` prompt tokens, ``R`` sampled tokens.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torchrl_sglang.agents.generated import Generated, OnTokens
from torchrl_sglang.agents.image_tokens import PromptImages
from torchrl_sglang.agents.server_part import FOR_THE_MOMENT, Broken, ServerParts, UnloadedError
from torchrl_sglang.agents.slots import ServerSlots
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.config.grammars import GRAMMARS
from torchrl_sglang.errors import (
    RequestRejectedError,
    ServerError,
    ServerLostError,
    ServerTimeoutError,
    ServerUnreachableError,
)
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.dispatch import dead_server
from torchrl_sglang.protocol.messages import GenerateReply, HttpRequest
from torchrl_sglang.protocol.stop_strings import StopStrings
from torchrl_sglang.protocol.version import version_number

__all__ = ["Generator"]

_log = logging.getLogger(__name__)

_MOST_FAILURES = 3
"""Servers that may fail on one sequence. A prompt on which every server dies must not end all of them."""
_MOST_BARREN = 20
"""Aborts in a row without a token. A weight update aborts once: what is sent again waits on the server."""
_ABORTED_AGAIN_S = 0.05
_REFUSED_AGAIN_S = 1.0
"""Where the answer does not say when: SGLang's own, whose queue is full."""
_LEAST_WAIT_S = 0.05
_LOCAL_AGAIN_S = 0.25
"""This machine has no free descriptor or port, or no network, for the moment."""
_QUEUE_FULL = "queue is full"
"""In the event with which SGLang (0.5.23) refuses a stream; what is not streamed it answers with 503."""


class Generator:
    """Generates sequences on the servers of a pool. Belongs to one event loop.

    Requests go to the servers themselves, also if the pool has a router.

    Args:
        pool: connected servers.
        max_in_flight: most sequences under way on each server; further ones wait.
        max_waiting: most sequences that wait.
        no_server_wait_s: how long a sequence waits while no server is healthy.
        adapter: name of a loaded LoRA adapter to use instead of the trainer's.
    """

    def __init__(
        self,
        pool: SGLangPool,
        *,
        max_in_flight: int = 256,
        max_waiting: int = 4096,
        no_server_wait_s: float = 60.0,
        adapter: str | None = None,
    ) -> None:
        self.pool = pool
        self.slots = ServerSlots(
            pool, max_in_flight=max_in_flight, max_waiting=max_waiting, no_server_wait_s=no_server_wait_s
        )
        self._no_server_wait_s = no_server_wait_s
        self._parts = ServerParts(pool, adapter=adapter)

    async def close(self) -> None:
        """Finish pending aborts and close all connections."""
        await self._parts.close()

    def close_departed(self) -> None:
        """Close the connections to servers that have left the pool."""
        self._parts.close_departed()

    async def ask(self, request: HttpRequest, *, timeout_s: float) -> Any:
        """Send a request that any server can answer, such as to parse a text; returns the parsed answer.

        Raises:
            ServerError: no server is healthy, or it did not answer.
        """
        client = self.pool.require_healthy("nothing was sent")[0]
        return await self._parts.calls(client).send(request, timeout_s=timeout_s)

    async def generate(
        self,
        ids_P: Sequence[int],
        sampling: SamplingParams,
        *,
        top_logprobs: int = 0,
        preferred: str | None = None,
        timeout_s: float | None = None,
        images: PromptImages | None = None,
        stops: StopStrings | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generated:
        """Generate one sequence. If the task is cancelled, the server's request is aborted.

        Args:
            ids_P: prompt token ids, already checked.
            sampling: how tokens are drawn; ``n`` is 1.
            top_logprobs: number of the most likely tokens to report for each.
            preferred: URL of the server that has the prompt's beginning in its prefix cache.
            timeout_s: seconds for all of it, waiting for a server included; ``None`` is what ``ClientConfig`` says.
            images: the prompt's images, each of which is one placeholder in ``ids_P``.
            stops: its stop strings, where one may lie across an interruption: no more than needed is generated behind
                it, and the caller cuts it off.
            on_tokens: called with the sequence so far. What it was given is never taken back.

        Raises:
            ServerTimeoutError: it took too long; the request was aborted.
            ServerError: no server is left, a server refused the request, or too many failed on it.
        """
        limit_s = timeout_s
        if limit_s is None:
            limit_s = self.pool.clients[0].config.generate_limit_s(sampling.max_new_tokens)
        deadline = _Deadline(limit_s)
        try:
            return await self._generate(ids_P, sampling, top_logprobs, preferred, images, stops, on_tokens, deadline)
        except asyncio.CancelledError:
            if not deadline.was_the_cause():
                raise
        finally:
            deadline.cancel()
        refused = f". Before that, {deadline.refusal}" if deadline.refusal is not None else ""
        raise ServerTimeoutError(
            f"the turn was not generated within {limit_s:g} s, waiting for a server included "
            f"(ClientConfig.generate_timeout_s sets the limit); it was aborted{refused}"
        )

    async def _generate(
        self,
        ids_P: Sequence[int],
        sampling: SamplingParams,
        top_logprobs: int,
        preferred: str | None,
        images: PromptImages | None,
        stops: StopStrings | None,
        on_tokens: OnTokens | None,
        deadline: _Deadline,
    ) -> Generated:
        done = Generated()
        failures = barren = refusals = 0
        local_since: float | None = None
        while True:
            before = len(done.output_ids)
            rest, is_watched = _rest(sampling, done.output_ids, stops)
            try:
                async with self.slots.take(preferred) as client:
                    done = await self._parts.generate(
                        client, ids_P, rest, done, top_logprobs=top_logprobs, images=images, on_tokens=on_tokens
                    )
            except RequestRejectedError as error:
                refusals += 1
                self._after_refusal(error, refusals, deadline)
                continue
            except UnloadedError:
                _log.warning("a turn is sent again: its adapter was unloaded before it was sent")
                continue
            except Broken as broken:
                if isinstance(broken.error, ServerUnreachableError) and broken.error.is_local:
                    local_since = local_since or time.monotonic()
                    if time.monotonic() - local_since > self._no_server_wait_s:
                        raise broken.error from broken
                    await asyncio.sleep(_LOCAL_AGAIN_S)
                    continue
                failures += not self.pool.has_left(broken.client)
                done = await self._after_failure(broken, done, failures, streamed=on_tokens is not None)
                if done.output_ids and _has_grammar(sampling):
                    raise ServerLostError(
                        f"{broken.client.url} was lost in the middle of a streamed response under a grammar, which "
                        "can't be continued in the middle: ask again",
                        server=broken.client.url,
                    ) from broken.error
                if len(done.output_ids) >= sampling.max_new_tokens:
                    return replace(done, finish_reason="length")
                continue
            if is_watched and done.finish_reason == "length" and len(done.output_ids) == before + rest.max_new_tokens:
                is_full = len(done.output_ids) >= self._room(done.prompt_ids or ids_P)
                if is_full or (stops is not None and stops.find(done.output_ids) is not None):
                    return done
                preferred = done.server
                continue
            if done.finish_reason != "abort":
                return done
            if len(done.output_ids) == before and _QUEUE_FULL in done.abort_message:
                refusals += 1
                full = RequestRejectedError(f"{done.server}: {done.abort_message}", server=done.server, status=503)
                self._after_refusal(full, refusals, deadline)
                continue
            barren = barren + 1 if len(done.output_ids) == before else 0
            if barren > _MOST_BARREN:
                raise ServerError(
                    f"{done.server} aborts this turn again and again, without a token: {done.abort_message}",
                    server=done.server,
                )
            preferred = done.server
            if _has_grammar(sampling):
                if on_tokens is not None and done.output_ids:
                    raise ServerError(
                        f"{done.server} aborted a response under a grammar, which can't be continued in the middle: "
                        "ask again",
                        server=done.server,
                    )
                done = Generated(resumes=done.resumes)
            elif len(done.output_ids) >= min(sampling.max_new_tokens, self._room(done.prompt_ids or ids_P)):
                return replace(done, finish_reason="length")
            done.resumes += 1
            # a server that aborts at once, since it is ending, is not flooded
            await asyncio.sleep(_ABORTED_AGAIN_S * (1 + barren))

    def _room(self, ids_P: Sequence[int]) -> int:
        """Sampled tokens with which a prompt can be sent again: near its end, the context is too long for a prompt."""
        longest = self.pool.max_prompt_tokens
        return sys.maxsize if longest is None else longest - len(ids_P)

    # ------------------------------------------------------------------ failures

    def _after_refusal(self, error: RequestRejectedError, refusals: int, deadline: _Deadline) -> None:
        """Let a request that was refused for the moment be sent again: later, or at once to another server.

        A proxy's 503 may come after the server has begun; its tokens, which nobody has seen, are thrown away.

        Raises:
            RequestRejectedError: it is not sent again: it would be refused again, or the turn has no time left for it.
        """
        if error.status not in FOR_THE_MOMENT or (error.is_from_proxy and error.retry_after_s is None):
            raise error
        wait_s = _REFUSED_AGAIN_S if error.retry_after_s is None else max(_LEAST_WAIT_S, error.retry_after_s)
        self.slots.refused(error.server or "", wait_s)
        deadline.refusal = error
        no_advice = error.retry_after_s is None and refusals * _REFUSED_AGAIN_S > self._no_server_wait_s
        if no_advice or (self.slots.all_refuse and wait_s >= deadline.left_s):
            raise error

    async def _after_failure(self, broken: Broken, done: Generated, failures: int, *, streamed: bool) -> Generated:
        """What to continue from after a server failed.

        Tokens that were not passed on are thrown away, so it doesn't matter whether the lost request still runs. Tokens
        that were passed on are kept.

        Raises:
            SGLangError: the failure, if it can't be mended elsewhere.
        """
        client, error = broken.client, broken.error
        has_left = self.pool.has_left(client)  # then its connections were cut
        if not has_left and await asyncio.to_thread(dead_server, client, error) is not None:
            self.pool.record_death(client.url, error)
        if failures >= _MOST_FAILURES:
            raise ServerError(
                f"{failures} servers failed on this turn, the last one so: {error}. It is not tried again",
                server=client.url,
            ) from error
        if not streamed or broken.part is None:
            return done
        now, known = self.pool.state.server(client.url), broken.known
        if (now.version, now.restarts, known.phase) != (known.version, known.restarts, "serving"):
            raise ServerLostError(
                f"{client.url} was lost in the middle of a streamed response, during which its weights were updated: "
                "which weights made which tokens is not known. Ask again",
                server=client.url,
            ) from error
        version = broken.label(GenerateReply(output_ids=[], weight_version=known.version)).weight_version
        count = len(broken.part.output_ids) - len(broken.part.versions)
        versions = [*broken.part.versions, *[version_number(version)] * count]
        return replace(broken.part, versions=versions, resumes=broken.part.resumes + 1)


class _Deadline:
    """Cancels the current task after a time.

    Neither ``asyncio.timeout``, which Python 3.10 has not, nor ``wait_for``, which takes a task of its own, and up to
    Python 3.11 forgets that it was cancelled if the work ends at the same moment.

    Attributes:
        refusal: the latest one for which the work waits.
    """

    __slots__ = ("_has_fired", "_task", "_timer", "refusal")

    def __init__(self, limit_s: float) -> None:
        self.refusal: RequestRejectedError | None = None
        self._task = asyncio.current_task()
        self._has_fired = False
        self._timer = asyncio.get_running_loop().call_later(limit_s, self._fire)

    @property
    def left_s(self) -> float:
        """Seconds until it fires."""
        return max(0.0, self._timer.when() - asyncio.get_running_loop().time())

    def _fire(self) -> None:
        self._has_fired = True
        if self._task is not None:
            self._task.cancel()

    def was_the_cause(self) -> bool:
        """Whether this, and nobody else, has cancelled the task, which then counts as not cancelled.

        Python 3.10 does not count cancellations: there one that comes with the deadline ends the turn with its error.
        """
        if not self._has_fired or self._task is None:
            return False
        return sys.version_info < (3, 11) or self._task.uncancel() == 0

    def cancel(self) -> None:
        """The work has ended."""
        self._timer.cancel()


def _has_grammar(sampling: SamplingParams) -> bool:
    return any(getattr(sampling, name) is not None for name in GRAMMARS)


def _rest(sampling: SamplingParams, ids_R: Sequence[int], stops: StopStrings | None) -> tuple[SamplingParams, bool]:
    """The settings for the next part of a sequence, and whether it is a short one.

    Behind the beginning of a stop string a short part shows whether its end follows.
    """
    if not ids_R:
        return sampling, False
    room = sampling.max_new_tokens - len(ids_R)
    watched = 0 if stops is None else stops.tokens_to_watch(ids_R)
    length = min(room, watched or room)
    least = min(length, max(0, sampling.min_new_tokens - len(ids_R)))
    return replace(sampling, max_new_tokens=length, min_new_tokens=least), length < room
