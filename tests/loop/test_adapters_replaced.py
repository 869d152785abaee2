"""Batches, streams and agents' turns that wait on a paused server while their adapter is replaced there."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.agent_kit import run, user
from tests.loop.test_adapters import PROMPT, adapted, greedy
from torchrl_sglang import RequestRejectedError, SamplingParams, SyncConfig, WeightSync
from torchrl_sglang.agents.served_model import ServedModel
from torchrl_sglang.agents.sessions import Sessions
from torchrl_sglang.agents.types import ChatRequest
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_continue, build_pause
from torchrl_sglang.server import SGLangServer

SHORT = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)


@pytest.mark.slow
def test_they_are_answered_as_the_current_one_answers(flagged_server: SGLangServer, tiny_llama: Path) -> None:
    pool = SGLangPool([SGLangClient(flagged_server.url)])
    pool.connect()
    sync = WeightSync(pool, SyncConfig(transport="lora", verify="off"))
    sync.push(adapted(tiny_llama, 1))
    first = pool.state.weights.adapter
    assert first is not None
    sessions = Sessions(ServedModel(pool))
    session = sessions.create()
    question = ChatRequest(messages=(user("dog"),), sampling={"max_new_tokens": 6, "ignore_eos": True})
    seen: list[Any] = []

    async def turns() -> Any:
        return await asyncio.gather(session.chat(question), session.chat(question, seen.append))

    pool.clients[0].send(build_pause("retract"))
    waiting = {
        "batch": Task(lambda: pool.generate([PROMPT], SHORT), name="batch"),
        "stream": Task(lambda: list(pool.stream(PROMPT, SHORT)), name="stream"),
        "chosen": Task(lambda: list(pool.stream(PROMPT, SHORT, lora=first.name)), name="chosen"),
        "turns": Task(lambda: run(turns()), name="turns"),
    }
    for _ in range(1000):
        if pool.clients[0].num_generating == 5:
            break
        threading.Event().wait(0.02)
    assert pool.clients[0].num_generating == 5
    threading.Event().wait(1.0)  # they have been sent; one that comes later is answered by the current adapter as well
    for seed in (2, 3):
        model = adapted(tiny_llama, seed)
        sync.push(model)
    current = pool.state.weights.adapter
    assert current is not None
    pool.clients[0].send(build_continue())
    with torch.no_grad():
        expected = greedy(model, 6)
    (reply,) = waiting["batch"].outcome().unwrap()
    assert (list(reply.output_ids), reply.weight_version) == (expected, current.version)
    last = waiting["stream"].outcome().unwrap()[-1]
    assert (list(last.output_ids), last.weight_version) == (expected, current.version)
    with pytest.raises(RequestRejectedError, match=first.name):
        waiting["chosen"].outcome().unwrap()
    for turn in waiting["turns"].outcome().unwrap():
        assert set(turn.choices[0].weight_versions) == {3}
    run(sessions.close())
    sync.close()
