"""Generates one part of a sequence on one server: the request, its answer or events, and its abort.

Shapes: ``P`` prompt tokens, ``R`` sampled tokens.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np

from torchrl_sglang.agents.generated import Generated, OnTokens
from torchrl_sglang.agents.image_tokens import PromptImages
from torchrl_sglang.agents.server_calls import ServerCalls
from torchrl_sglang.agents.streamed_part import StreamedPart
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import (
    ProtocolError,
    RequestRejectedError,
    ServerError,
    ServerLostError,
    ServerUnreachableError,
    SGLangError,
    WeightSyncError,
)
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.checks import refuse_mixed_weights
from torchrl_sglang.pool.state import ServerState
from torchrl_sglang.protocol.control import build_abort
from torchrl_sglang.protocol.generate import build_generate, parse_one, token_versions
from torchrl_sglang.protocol.media import Media
from torchrl_sglang.protocol.messages import GenerateReply, HttpRequest

__all__ = ["FOR_THE_MOMENT", "Broken", "Label", "ServerParts", "UnloadedError"]

_log = logging.getLogger(__name__)

_ABORT_TIMEOUT_S = 10.0
_VERIFIED_POLL_S = 0.02
FOR_THE_MOMENT = (429, 503)
"""Statuses of requests that a server, or a proxy before it, refuses for the moment."""
_MISSED = (502, 503)
"""A proxy does not reach the server, or has lost it in the middle: the request may still run."""


Label = Callable[[GenerateReply], GenerateReply]
"""Gives a reply the weight version of the adapter that it was made with."""


class Broken(Exception):
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


class UnloadedError(Exception):
    """A part was not begun, since the trainer's adapter that it named is not the current one any more."""


class ServerParts:
    """Generates parts of sequences on the servers of a pool. Belongs to one event loop.

    Args:
        pool: connected servers.
        adapter: name of a loaded LoRA adapter to use instead of the trainer's.
    """

    def __init__(self, pool: SGLangPool, *, adapter: str | None = None) -> None:
        self._pool = pool
        self._adapter = adapter
        self._calls: dict[str, ServerCalls] = {}
        self._retired: list[ServerCalls] = []
        self._aborts: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Finish pending aborts and close all connections."""
        if self._aborts:
            await asyncio.wait(self._aborts, timeout=_ABORT_TIMEOUT_S)
        for calls in [*self._calls.values(), *self._retired]:
            await calls.close()
        self._calls.clear()
        self._retired.clear()

    def calls(self, client: SGLangClient) -> ServerCalls:
        """The connections to a server."""
        known = self._calls.get(client.url)
        if known is None or known.client is not client:
            if known is not None:
                self._retire(known)
            known = self._calls[client.url] = ServerCalls(client)
        return known

    def close_departed(self) -> None:
        """Close the connections to servers that have left the pool; those in use are closed after their answer."""
        present = {client.url for client in self._pool.clients}
        for url in [url for url in self._calls if url not in present]:
            self._retire(self._calls.pop(url))

    def _retire(self, calls: ServerCalls) -> None:
        calls.retire()
        self._retired = [each for each in (*self._retired, calls) if each.is_open]

    async def generate(
        self,
        client: SGLangClient,
        ids_P: Sequence[int],
        sampling: SamplingParams,
        done: Generated,
        *,
        top_logprobs: int = 0,
        images: PromptImages | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generated:
        """The sequence with what one server adds to it.

        Args:
            client: the server.
            ids_P: prompt token ids, each image one placeholder.
            sampling: how the rest is drawn.
            done: what is there of it.
            top_logprobs: number of the most likely tokens to report for each.
            images: the prompt's images.
            on_tokens: called with the sequence so far.

        Raises:
            Broken: the server did not finish its part.
            UnloadedError: its adapter was unloaded before it was sent.
            SGLangError: the server refused the request.
        """
        adapter, label = self._pool.resolve_adapter(self._adapter)
        request_id = uuid.uuid4().hex
        request = build_generate(
            [],
            sampling,
            stream=on_tokens is not None,
            request_ids=[request_id],
            lora=adapter,
            cache_salt=self._pool.state.weights.cache_salt,
            media=None if images is None else [Media(images=images.urls)],
        )
        # An array is written as JSON without an object for each token of a long conversation.
        ids_T = np.array([*ids_P, *done.output_ids] if done.output_ids else ids_P, dtype=np.int64)
        further: dict[str, Any] = {"input_ids": [ids_T]}
        if images is not None:
            further["return_prompt_token_ids"] = True
        if top_logprobs:
            further["top_logprobs_num"] = top_logprobs
        request = replace(request, body={**(request.body or {}), **further})
        before = self._pool.state.servers
        last: Generated | None = None
        try:
            if on_tokens is None:
                item = await self._answer(client, request)
            else:
                part = StreamedPart(done, server=client.url)
                async with aclosing(self.calls(client).stream(request)) as events:
                    async for event in events:
                        if (finished := part.add(event)) is not None:
                            item = finished
                            break
                        last = part.so_far
                        on_tokens(last)
                    else:
                        raise ProtocolError(
                            f"{client.url} ended a stream without a finished response", server=client.url
                        )
            reply = parse_one(item, server=client.url)
            await self._check(reply, before, client, label, streamed=last is not None)
            reply = label(reply)
            if images is not None and reply.output_ids:
                done = _with_prompt(done, images, ids_P, item, reply)
            top = item["meta_info"].get("output_top_logprobs") or [] if top_logprobs else []
            whole = done.with_part(reply, top, versions=token_versions(reply))
            if on_tokens is not None:
                on_tokens(whole)
            return whole
        except asyncio.CancelledError:
            self._abort(client, request_id)
            raise
        except RequestRejectedError as error:
            if last is None and self._adapter is None and self._pool.was_unloaded(adapter, error):
                raise UnloadedError from error
            if last is not None and error.status in FOR_THE_MOMENT:  # what was told of a stream can't be sampled anew
                known = self._known(client, before)
                raise Broken(client=client, error=error, known=known, label=label, part=last) from error
            if not (error.is_from_proxy and error.status in _MISSED):
                raise
            self._abort(client, request_id)
            if error.retry_after_s is not None:
                raise
            raise Broken(client=client, error=error, known=self._known(client, before), label=label) from error
        except (ServerUnreachableError, ServerLostError, ProtocolError) as error:
            if not isinstance(error, ServerUnreachableError):
                self._abort(client, request_id)
            known = self._known(client, before)
            raise Broken(client=client, error=error, known=known, label=label, part=last) from error

    def _known(self, client: SGLangClient, before: Mapping[str, ServerState]) -> ServerState:
        return before.get(client.url) or self._pool.state.server(client.url)

    async def _answer(self, client: SGLangClient, request: HttpRequest) -> Any:
        """The answer to one prompt.

        Raises:
            ProtocolError: it is not finished, or not one.
        """
        answer = await self.calls(client).send(request)
        if not isinstance(answer, list) or len(answer) != 1:
            raise ProtocolError(f"{client.url} answered one prompt with {str(answer)[:100]!r}", server=client.url)
        meta = answer[0].get("meta_info") if isinstance(answer[0], Mapping) else None
        if isinstance(meta, Mapping) and meta.get("finish_reason") is None:
            raise ProtocolError(f"{client.url} ended an answer without a finished response", server=client.url)
        return answer[0]

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
            Broken: it was not: it is thrown away.
            ProtocolError: a log-prob is NaN.
        """
        if any(map(math.isnan, reply.output_logprobs or ())):
            raise ServerError(
                f"{client.url} computed NaN or infinite log-probs: its weights or activations overflow. The turn is "
                "thrown away",
                server=client.url,
            )
        checks = self._pool.reply_checks
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
            raise Broken(client=client, error=error, known=self._pool.state.server(client.url), label=label)
        self._pool.state.replies_seen([reply.weight_version], client.url)

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


def _with_prompt(
    done: Generated, images: PromptImages, ids_P: Sequence[int], item: Mapping[str, Any], reply: GenerateReply
) -> Generated:
    """The sequence with the prompt as the server saw it, for its first part and for all further ones.

    Raises:
        ServerError: the server saw other tokens of the answer than were sampled, or another prompt than before.
    """
    sent = [*ids_P, *done.output_ids]
    reported = item.get("prompt_token_ids")
    seen = images.seen_by_server(sent, reported, reply.prompt_tokens, server=reply.server)
    split = len(seen) - len(done.output_ids)
    prompt_ids, rest = seen[:split], seen[split:]
    if rest != done.output_ids or done.prompt_ids not in (None, prompt_ids):
        raise ServerError(
            f"{reply.server} tokenized a prompt with images anew when the answer was continued: the tokens it saw are "
            "not those that were sampled. Ask again",
            server=reply.server,
        )
    return replace(done, prompt_ids=prompt_ids)
