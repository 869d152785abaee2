"""Generates one sequence: waits for a server, continues what a weight update aborted, and leaves a server that dies.

Shapes: ``P`` prompt tokens, ``R`` sampled tokens.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from torchrl_sglang.agents.server_calls import ServerCalls
from torchrl_sglang.agents.slots import ServerSlots
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.config.grammars import GRAMMARS
from torchrl_sglang.errors import (
    ProtocolError,
    RequestRejectedError,
    ServerError,
    ServerLostError,
    ServerTimeoutError,
    ServerUnreachableError,
    SGLangError,
    WeightSyncError,
)
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.checks import refuse_mixed_weights
from torchrl_sglang.pool.dispatch import dead_server
from torchrl_sglang.pool.state import ServerState
from torchrl_sglang.protocol.control import build_abort
from torchrl_sglang.protocol.generate import build_generate, parse_one, token_versions
from torchrl_sglang.protocol.messages import GenerateReply, HttpRequest
from torchrl_sglang.protocol.stream_events import StreamedReply
from torchrl_sglang.protocol.version import version_number

__all__ = ["Generated", "Generator", "OnTokens"]

_log = logging.getLogger(__name__)

_MOST_FAILURES = 3
"""Servers that may fail on one sequence. A prompt on which every server dies must not end all of them."""
_MOST_BARREN = 20
"""Aborts in a row without a token. A weight update aborts once: what is sent again waits on the server."""
_ABORTED_AGAIN_S = 0.05
_ABORT_TIMEOUT_S = 10.0
_VERIFIED_POLL_S = 0.02


@dataclass(slots=True, kw_only=True)
class Generated:
    """A sequence, finished or so far.

    Attributes:
        output_ids: sampled tokens, length ``R``.
        log_probs: natural-log probability of each, length ``R``.
        versions: number of the weights that generated each, length ``R``; of a sequence that is not finished yet only
            those of its finished parts.
        top_log_probs: per token ``[log_prob, id, text]`` of the most likely ones, if requested.
        finish_reason: ``"stop"`` or ``"length"``.
        matched: the stop token or string that ended it.
        abort_message: what the server said when it aborted the last part.
        cached_tokens: prompt tokens from the prefix cache.
        server: URL of the server that generated the last part.
        resumes: how often it was continued.
    """

    output_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    top_log_probs: list[Any] = field(default_factory=list)
    finish_reason: str = ""
    matched: int | str | None = None
    abort_message: str = ""
    cached_tokens: int = 0
    server: str = ""
    resumes: int = 0

    def with_part(self, reply: GenerateReply, top: Sequence[Any], *, versions: Sequence[int]) -> Generated:
        """The sequence with a further part."""
        return Generated(
            output_ids=self.output_ids + reply.output_ids,
            log_probs=self.log_probs + (reply.output_logprobs or []),
            versions=[*self.versions, *versions],
            top_log_probs=[*self.top_log_probs, *top],
            finish_reason=reply.finish_reason,
            matched=reply.matched,
            abort_message=reply.abort_message,
            cached_tokens=self.cached_tokens if self.resumes or self.output_ids else reply.cached_tokens,
            server=reply.server,
            resumes=self.resumes,
        )


OnTokens = Callable[[Generated], None]


Label = Callable[[GenerateReply], GenerateReply]
"""Gives a reply the weight version of the adapter that it was made with."""


class _Broken(Exception):
    """A server left a part unfinished; ``part`` is the sequence with what came of it, in a stream."""

    def __init__(
        self,
        *,
        client: SGLangClient,
        error: SGLangError,
        known: ServerState,
        label: Label,
        part: Generated | None = None,
    ) -> None:
        super().__init__(str(error))
        self.client, self.error, self.part, self.known, self.label = client, error, part, known, label


class _UnloadedError(Exception):
    """A part was not begun, since the trainer's adapter that it named is not the current one any more."""


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
        self._adapter = adapter
        self._calls: dict[str, ServerCalls] = {}
        self._aborts: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Finish pending aborts and close all connections."""
        if self._aborts:
            await asyncio.wait(self._aborts, timeout=_ABORT_TIMEOUT_S)
        for calls in self._calls.values():
            await calls.close()
        self._calls.clear()

    def calls(self, client: SGLangClient) -> ServerCalls:
        """The connections to a server."""
        if client.url not in self._calls:
            self._calls[client.url] = ServerCalls(client)
        return self._calls[client.url]

    async def ask(self, request: HttpRequest, *, timeout_s: float) -> Any:
        """Send a request that any server can answer, such as to parse a text; returns the parsed answer.

        Raises:
            ServerError: no server is healthy, or it did not answer.
        """
        client = self.pool.require_healthy("nothing was sent")[0]
        return await self.calls(client).send(request, timeout_s=timeout_s)

    async def generate(
        self,
        ids_P: Sequence[int],
        sampling: SamplingParams,
        *,
        top_logprobs: int = 0,
        preferred: str | None = None,
        timeout_s: float | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generated:
        """Generate one sequence. If the task is cancelled, the server's request is aborted.

        Args:
            ids_P: prompt token ids, already checked.
            sampling: how tokens are drawn; ``n`` is 1.
            top_logprobs: number of the most likely tokens to report for each.
            preferred: URL of the server that has the prompt's beginning in its prefix cache.
            timeout_s: seconds for all of it, waiting for a server included; ``None`` is what ``ClientConfig`` says.
            on_tokens: called with the sequence so far. What it was given is never taken back.

        Raises:
            ServerTimeoutError: it took too long; the request was aborted.
            ServerError: no server is left, a server refused the request, or too many failed on it.
        """
        limit_s = timeout_s
        if limit_s is None:
            limit_s = self.pool.clients[0].config.generate_limit_s(sampling.max_new_tokens)
        work = asyncio.ensure_future(self._generate(ids_P, sampling, top_logprobs, preferred, on_tokens))
        try:
            # Not wait_for: up to Python 3.11 it forgets that it was cancelled if the work ends at the same moment.
            await asyncio.wait({work}, timeout=limit_s)
            if work.done():
                return work.result()
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
            if not work.cancelled():
                work.exception()  # marks it as seen
        raise ServerTimeoutError(
            f"the turn was not generated within {limit_s:g} s, waiting for a server included "
            "(ClientConfig.generate_timeout_s sets the limit); it was aborted"
        )

    async def _generate(
        self,
        ids_P: Sequence[int],
        sampling: SamplingParams,
        top_logprobs: int,
        preferred: str | None,
        on_tokens: OnTokens | None,
    ) -> Generated:
        done = Generated()
        failures = barren = 0
        while True:
            before = len(done.output_ids)
            rest = _rest(sampling, len(done.output_ids))
            try:
                async with self.slots.take(preferred) as client:
                    done = await self._part(client, ids_P, rest, done, top_logprobs, on_tokens)
            except _UnloadedError:
                _log.warning("a turn is sent again: its adapter was unloaded before it was sent")
                continue
            except _Broken as broken:
                failures += not self.pool.state.has_left(broken.client.url)
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
            if done.finish_reason != "abort":
                return done
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
            elif len(done.output_ids) >= min(sampling.max_new_tokens, self._room(ids_P)):
                return replace(done, finish_reason="length")
            done.resumes += 1
            await asyncio.sleep(
                _ABORTED_AGAIN_S * (1 + barren)
            )  # a server that aborts at once, since it is ending, is not flooded

    def _room(self, ids_P: Sequence[int]) -> int:
        """Sampled tokens with which a prompt can be sent again: near its end, the context is too long for a prompt."""
        longest = self.pool.max_prompt_tokens
        return sys.maxsize if longest is None else longest - len(ids_P)

    # ------------------------------------------------------------------ one part on one server

    async def _part(
        self,
        client: SGLangClient,
        ids_P: Sequence[int],
        sampling: SamplingParams,
        done: Generated,
        top_logprobs: int,
        on_tokens: OnTokens | None,
    ) -> Generated:
        """The sequence with what one server adds to it.

        Raises:
            _Broken: the server did not finish its part.
            _UnloadedError: its adapter was unloaded before it was sent.
        """
        adapter, label = self.pool.resolve_adapter(self._adapter)
        request_id = uuid.uuid4().hex
        request = build_generate(
            [[*ids_P, *done.output_ids]],
            sampling,
            stream=on_tokens is not None,
            request_ids=[request_id],
            lora=adapter,
            cache_salt=self.pool.state.weights.cache_salt,
        )
        if top_logprobs:
            request = replace(request, body={**(request.body or {}), "top_logprobs_num": top_logprobs})
        before = self.pool.state.servers
        last: Generated | None = None
        try:
            async with aclosing(self._events(client, request, stream=on_tokens is not None)) as items:
                async for item in items:
                    reply = parse_one(item, server=client.url)
                    top = item["meta_info"].get("output_top_logprobs") or [] if top_logprobs else []
                    if item["meta_info"].get("finish_reason") is not None:
                        await self._check(reply, before, client, label, streamed=last is not None)
                        reply = label(reply)
                        whole = done.with_part(reply, top, versions=token_versions(reply))
                        if on_tokens is not None:
                            on_tokens(whole)
                        return whole
                    last = done.with_part(reply, top, versions=[])
                    if on_tokens is not None:
                        on_tokens(last)
            raise ProtocolError(f"{client.url} ended an answer without a finished response", server=client.url)
        except asyncio.CancelledError:
            self._abort(client, request_id)
            raise
        except RequestRejectedError as error:
            if last is None and self._adapter is None and self.pool.was_unloaded(adapter, error):
                raise _UnloadedError from error
            raise
        except (ServerUnreachableError, ServerLostError, ProtocolError) as error:
            if not isinstance(error, ServerUnreachableError):
                self._abort(client, request_id)
            known = before.get(client.url) or self.pool.state.server(client.url)
            raise _Broken(client=client, error=error, known=known, label=label, part=last) from error

    async def _events(self, client: SGLangClient, request: HttpRequest, *, stream: bool) -> AsyncGenerator[Any, None]:
        """The whole answer, or the events of a stream, each with all tokens so far."""
        calls = self.calls(client)
        if not stream:
            answer = await calls.send(request)
            if not isinstance(answer, list) or len(answer) != 1:
                raise ProtocolError(f"{client.url} answered one prompt with {str(answer)[:100]!r}", server=client.url)
            yield answer[0]
            return
        sequence = StreamedReply(client.url)
        async with aclosing(calls.stream(request)) as events:
            async for event in events:
                yield sequence.add(event)

    async def _check(
        self,
        reply: GenerateReply,
        before: Mapping[str, ServerState],
        client: SGLangClient,
        label: Label,
        *,
        streamed: bool,
    ) -> None:
        """Require that a reply was made with known weights, as :meth:`SGLangPool.generate` does.

        Raises:
            _Broken: it was not: it is thrown away.
            ProtocolError: a log-prob is NaN.
        """
        if any(map(math.isnan, reply.output_logprobs or ())):
            raise ServerError(
                f"{client.url} computed NaN or infinite log-probs: its weights or activations overflow. The turn is "
                "thrown away",
                server=client.url,
            )
        checks = self.pool.reply_checks
        deadline = time.monotonic() + client.config.update_timeout_s
        while checks.is_unverified([reply]) and time.monotonic() < deadline:
            await asyncio.sleep(_VERIFIED_POLL_S)
        error: SGLangError | None = None
        try:
            refuse_mixed_weights([reply])
        except WeightSyncError as mixed:
            error = mixed
        # What a leaving server aborts is continued elsewhere, as what a weight update aborts: its tokens are good.
        if checks.is_wrong(replace(reply, finish_reason="stop"), before):
            error = ServerError(f"{client.url} held other weights than expected", server=client.url)
        if error is not None:
            _log.warning("a turn is generated again: %s", error)
            if streamed:
                raise error
            raise _Broken(client=client, error=error, known=self.pool.state.server(client.url), label=label)
        self.pool.state.replies_seen([version_number(reply.weight_version)], client.url)

    # ------------------------------------------------------------------ failures

    async def _after_failure(self, broken: _Broken, done: Generated, failures: int, *, streamed: bool) -> Generated:
        """What to continue from after a server failed.

        Tokens that were not passed on are thrown away, so it doesn't matter whether the lost request still runs. Tokens
        that were passed on are kept.

        Raises:
            SGLangError: the failure, if it can't be mended elsewhere.
        """
        client, error = broken.client, broken.error
        if isinstance(error, ServerUnreachableError) and error.is_local:
            raise error
        has_left = self.pool.state.has_left(client.url)  # then its connections were cut
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
        return replace(broken.part, versions=[*broken.part.versions, *[version_number(version)] * count])

    def _abort(self, client: SGLangClient, request_id: str) -> None:
        """End a request on its server, in the background."""

        async def abort() -> None:
            try:
                await self.calls(client).send(build_abort(request_id), timeout_s=_ABORT_TIMEOUT_S)
            except SGLangError as error:
                _log.debug("the abort of a request was not answered: %s", error)

        task = asyncio.get_running_loop().create_task(abort())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)


def _has_grammar(sampling: SamplingParams) -> bool:
    return any(getattr(sampling, name) is not None for name in GRAMMARS)


def _rest(sampling: SamplingParams, done: int) -> SamplingParams:
    """The settings for the rest of a sequence of which ``done`` tokens are there."""
    if not done:
        return sampling
    room = sampling.max_new_tokens - done
    return replace(sampling, max_new_tokens=room, min_new_tokens=min(room, max(0, sampling.min_new_tokens - done)))
