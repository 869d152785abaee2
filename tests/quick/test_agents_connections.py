"""Connections to servers that have left the pool are closed; one that is in use is closed after its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tests.agent_kit import run
from tests.fake_sglang import FakeServer
from torchrl_sglang.agents.generated import Generated
from torchrl_sglang.agents.server_calls import ServerCalls
from torchrl_sglang.agents.server_part import ServerParts
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.pool import SGLangPool

PROMPT = [1, 2, 3]


async def closed(calls: ServerCalls) -> None:
    deadline = time.monotonic() + 30
    while calls.is_open:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_connections_to_a_server_that_left_are_closed(make: Callable[..., FakeServer]) -> None:
    pool = SGLangPool([SGLangClient(make().url), SGLangClient(make().url)])
    pool.connect()
    leaving, staying = pool.clients

    async def story() -> None:
        parts = ServerParts(pool)
        for client in (leaving, staying):
            await parts.generate(client, PROMPT, SamplingParams(max_new_tokens=1), Generated())
        calls = parts.calls(leaving)
        parts.close_departed()
        assert calls.is_open
        await asyncio.to_thread(pool.remove, leaving.url)
        parts.close_departed()
        await closed(calls)
        assert parts.calls(staying).is_open
        await parts.close()

    run(story())
    pool.close()


def test_a_connection_in_use_is_closed_after_its_answer(make: Callable[..., FakeServer]) -> None:
    pool = SGLangPool([SGLangClient(make(step_s=0.02).url)])
    pool.connect()
    (client,) = pool.clients

    async def story() -> None:
        parts = ServerParts(pool)
        calls = parts.calls(client)
        sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
        turn = asyncio.ensure_future(parts.generate(client, PROMPT, sampling, Generated()))
        while not calls.is_open:
            await asyncio.sleep(0.001)
        calls.retire()
        assert calls.is_open
        assert len((await turn).output_ids) == 20
        await closed(calls)
        await parts.close()

    run(story())
    pool.close()
