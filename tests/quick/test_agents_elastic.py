"""Turns while servers leave the pool, and the versions of tokens whose server was lost."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.agent_kit import run, told_tokens
from tests.fake_sglang import FakeServer
from tests.quick.test_agents_generation import a_few_tokens, ask, check_log_probs, paths, serving
from torchrl_sglang.agents.served_model import ServedModel
from torchrl_sglang.agents.session import Session
from torchrl_sglang.agents.sessions import Sessions
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.errors import ServerLostError
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.pool.checks import label_with_version
from torchrl_sglang.pool.records import Adapter


def busy_one(servers: list[FakeServer]) -> FakeServer:
    return next(server for server in servers if paths(server, "/generate"))


def turn_while(
    session: Session, servers: list[FakeServer], meanwhile: Callable[[FakeServer], None], *, streams: bool
) -> tuple[Any, list[Any]]:
    """A turn of 40 tokens and what it reported; ``meanwhile`` runs in a thread, with the server that generates it."""
    seen: list[Any] = []

    async def story() -> Any:
        turn = asyncio.ensure_future(session.chat(ask(max_new_tokens=40), seen.append if streams else None))
        await a_few_tokens(seen, servers, streams=streams)
        await asyncio.to_thread(meanwhile, busy_one(servers))
        return await turn

    return run(story()), seen


@pytest.mark.parametrize("streams", [False, True])
def test_a_turn_is_continued_elsewhere_when_its_server_leaves(
    make: Callable[..., FakeServer], tiny_llama: Path, streams: bool
) -> None:
    servers = [make(step_s=0.02), make(step_s=0.02)]
    with serving(*servers) as sessions:
        session, pool = sessions.create(), sessions.model.pool
        turn, seen = turn_while(session, servers, lambda busy: pool.remove(busy.url, drain=False), streams=streams)
        assert len(turn.choices[0].token_ids) == 40
        assert len(pool.clients) == 1
        (trajectory,) = session.trajectories()
        check_log_probs([trajectory], tiny_llama)
        assert turn.choices[0].token_ids[: len(told_tokens(seen))] == told_tokens(seen)


def test_tokens_of_a_lost_stream_have_the_version_of_the_adapter_that_it_began_with(
    make: Callable[..., FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [make(step_s=0.02), make(step_s=0.02)]
    with serving(*servers) as sessions:
        session, pool = sessions.create(), sessions.model.pool
        seen: list[Any] = []

        def resolve(_lora: str | None) -> Any:
            adapter = pool.state.weights.adapter
            assert adapter is not None
            return None, partial(label_with_version, adapter.version)

        monkeypatch.setattr(pool, "resolve_adapter", resolve)
        pool.state.adapter_switched(Adapter(name="three", version="3@abcd"))

        async def story() -> Any:
            turn = asyncio.ensure_future(session.chat(ask(max_new_tokens=40), seen.append))
            await a_few_tokens(seen, servers, streams=True)
            pool.state.adapter_switched(Adapter(name="four", version="4@abcd"))
            await asyncio.to_thread(busy_one(servers).stop)
            return await turn

        versions = run(story()).choices[0].weight_versions
        assert len(versions) == 40
        assert versions[0] == 3, "the tokens of the first server"
        assert versions[-1] == 4
        assert sorted(versions) == list(versions)


def test_a_server_that_joins_gets_turns(make: Callable[..., FakeServer]) -> None:
    first, second = make(step_s=0.02), make(step_s=0.02)
    with serving(first) as sessions:
        sessions.model.pool.add(second.url)

        async def story() -> None:
            await asyncio.gather(*(sessions.create().chat(ask(f"dog {number}")) for number in range(4)))

        run(story())
        assert paths(first, "/generate") == paths(second, "/generate") == 2


def test_a_gateway_in_another_process_follows_the_trainers_pool(
    make: Callable[..., FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrl_sglang.agents.slots._FOLLOW_S", 0.0)
    first, second = make(), make()
    trainers = SGLangPool([SGLangClient(first.url)])
    copy = pickle.loads(pickle.dumps(trainers))
    sessions = Sessions(ServedModel(copy))

    def turns_until(there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not there():
            assert time.monotonic() < deadline
            run(sessions.create().chat(ask()))

    try:
        run(sessions.create().chat(ask()))
        trainers.add(second.url)
        turns_until(lambda: len(copy.healthy) == 2)
        trainers.remove(first.url)
        turns_until(lambda: [client.url for client in copy.clients] == [second.url])
        before = paths(first, "/generate")
        run(sessions.create().chat(ask()))
        assert paths(first, "/generate") == before
    finally:
        run(sessions.close())
        trainers.close()


def test_a_lost_stream_under_a_grammar_is_not_continued_in_the_middle(make: Callable[..., FakeServer]) -> None:
    servers = [make(step_s=0.02), make(step_s=0.02)]
    with serving(*servers) as sessions:
        session = sessions.create()
        seen: list[Any] = []

        async def story() -> None:
            request = ask(max_new_tokens=40, json_schema={"type": "object"})
            turn = asyncio.ensure_future(session.chat(request, seen.append))
            await a_few_tokens(seen, servers, streams=True)
            await asyncio.to_thread(busy_one(servers).stop)
            await turn

        with pytest.raises(ServerLostError, match="under a grammar"):
            run(story())
        assert session.trajectories() == []
