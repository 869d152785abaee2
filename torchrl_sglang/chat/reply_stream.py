"""Streamed replies: servers take turns, and a server that can't be reached is skipped."""

from __future__ import annotations

import itertools
from collections.abc import Generator

from torchrl_sglang.chat.turn import Turn
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config.checking import require_number
from torchrl_sglang.errors import ProtocolError, ServerError, ServerUnreachableError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.checks import refuse_mixed_weights
from torchrl_sglang.protocol.generate import build_generate, parse_one
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.stream_events import StreamedReply

__all__ = ["ReplyStream"]


class ReplyStream:
    """Streams replies from the servers of a pool.

    Args:
        pool: the servers.
    """

    def __init__(self, pool: SGLangPool) -> None:
        self.pool = pool
        self._next = itertools.count()

    def replies(self, turn: Turn, *, timeout_s: float | None) -> Generator[GenerateReply, None, None]:
        """The reply as it grows, all tokens so far each time.

        A server that can't be reached is skipped. A stream that has begun is not repeated on another server.

        Args:
            turn: the call.
            timeout_s: seconds between two events; ``None`` is ``ClientConfig.generate_timeout_s``.

        Raises:
            ConfigError: a prompt the servers can't serve.
            ServerError: no server is left, or a server failed.
            ProtocolError: a stream ended without a finished response.
            WeightSyncError: tokens were generated with half-updated weights.
        """
        require_number("timeout_s", timeout_s, optional=True, above=0)
        self.pool.check([turn.ids_T], turn.sampling)
        lora, labelled = self.pool.resolve_adapter(turn.adapter)
        request = build_generate(
            [turn.ids_T],
            turn.sampling,
            return_logprobs=turn.return_log_probs,
            stream=True,
            lora=lora,
            cache_salt=self.pool.state.weights.cache_salt,
            media=[turn.media] if turn.media else None,
        )
        while True:
            client = self.pick_server()
            sequence = StreamedReply(client.url)
            try:
                for event in client.stream(request, timeout_s=timeout_s):
                    whole = sequence.add(event)
                    reply = parse_one(whole, server=client.url, return_logprobs=turn.return_log_probs)
                    refuse_mixed_weights([reply])
                    yield labelled(reply)
            except ServerUnreachableError as error:
                self.pool.record_death(client.url, error)
                if not self.pool.healthy:
                    raise
                continue
            if not sequence.is_finished:
                raise ProtocolError(f"{client.url} ended a stream without a finished response", server=client.url)
            return

    def pick_server(self) -> SGLangClient:
        """The next healthy server.

        Raises:
            ServerError: none is left.
        """
        self.pool.poll_dead_servers()
        clients = self.pool.healthy
        if not clients:
            raise ServerError(f"no server is left to answer: {dict(self.pool.quarantined)}")
        return clients[next(self._next) % len(clients)]
