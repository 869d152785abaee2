"""Pools of fake servers, and what many tests send to them."""

from __future__ import annotations

from tests.fake_sglang import FakeServer
from torchrl_sglang import SamplingParams
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool

PROMPTS = [[index + 3, 7, 8] for index in range(8)]
SHORT = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)


def pool_of(*servers: FakeServer) -> SGLangPool:
    """A connected pool."""
    pool = SGLangPool([SGLangClient(server.url) for server in servers])
    pool.connect()
    return pool


def servers_of(pool: SGLangPool) -> set[str]:
    """The servers that answer a batch."""
    return {reply.server for reply in pool.generate(PROMPTS, SHORT)}
