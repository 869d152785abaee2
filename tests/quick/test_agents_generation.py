"""Turns on servers: updates in the middle, servers that die, requests that nobody waits for any more."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.agent_kit import check_parents, run, told_tokens, user
from tests.fake_sglang import FakeServer, Fault, logprobs, signature
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang.agents.served_model import ServedModel
from torchrl_sglang.agents.session import Session
from torchrl_sglang.agents.sessions import Sessions
from torchrl_sglang.agents.settings import SessionSettings
from torchrl_sglang.agents.types import ChatRequest, Trajectory
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import ClientConfig
from torchrl_sglang.errors import (
    ConfigError,
    OverloadedError,
    RequestRejectedError,
    ServerError,
    ServerTimeoutError,
)
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import (
    build_continue,
    build_pause,
    build_set_version,
)

VOCAB_SIZE = 320


@contextmanager
def serving(*servers: FakeServer, client: ClientConfig | None = None, **settings: Any) -> Iterator[Sessions]:
    pool = SGLangPool([SGLangClient(server.url, client) for server in servers])
    sessions = Sessions(ServedModel(pool, settings=SessionSettings(**settings)))
    try:
        yield sessions
    finally:
        run(sessions.close())
        pool.close()


def ask(text: str = "dog", **sampling: Any) -> ChatRequest:
    return ChatRequest(messages=(user(text),), sampling={"max_new_tokens": 8, "ignore_eos": True, **sampling})


def check_log_probs(trajectories: list[Trajectory], folder: Path) -> None:
    """The log-probs are those of a server that holds the folder's weights, computed from the tokens alone."""
    weights = signature(read_checkpoint(folder))
    for each in trajectories:
        wanted = logprobs(weights, each.token_ids, VOCAB_SIZE)
        for masked, recorded, value in zip(each.loss_mask, each.log_probs, wanted, strict=True):
            assert recorded == (pytest.approx(value, abs=1e-6) if masked else 0.0)


async def a_few_tokens(seen: list[Any], servers: list[FakeServer], *, streams: bool) -> None:
    """Wait until tokens have come; without a stream, until the request has, and long enough for some tokens."""
    while streams and len(told_tokens(seen)) < 3:
        await asyncio.sleep(0.001)
    while not any(paths(server, "/generate") for server in servers):
        await asyncio.sleep(0.001)
    await asyncio.sleep(0 if streams else 0.1)


def paths(server: FakeServer, path: str) -> int:
    return sum(event["path"] == path for event in server.events)


@pytest.mark.parametrize("streams", [False, True])
def test_several_turns_have_the_log_probs_of_their_tokens(fake: FakeServer, tiny_llama: Path, streams: bool) -> None:
    with serving(fake) as sessions:
        session = sessions.create()
        messages: list[Any] = [user("dog")]

        async def talk() -> None:
            for _ in range(3):
                request = ChatRequest(messages=tuple(messages), sampling={"max_new_tokens": 6, "n": 2}, top_logprobs=2)
                reports: list[Any] = []
                turn = await session.chat(request, reports.append if streams else None)
                assert all(len(choice.top_log_probs) == len(choice.token_ids) for choice in turn.choices)
                assert bool(reports) == streams
                messages.extend([dict(turn.choices[1].message), user("go on")])

        run(talk())
        assert len(session.trajectories()) == 4
        check_log_probs(session.trajectories(), tiny_llama)
        check_parents(session.trajectories(), session.info().sampled_tokens)


def test_the_second_turn_finds_the_first_in_the_prefix_cache(fake: FakeServer) -> None:
    with serving(fake) as sessions:
        session = sessions.create()
        first = run(session.chat(ask()))
        request = ChatRequest(
            messages=(user("dog"), first.choices[0].message, user("x")), sampling={"max_new_tokens": 2}
        )
        second = run(session.chat(request))
        # the last token's state is not computed before the next request
        assert second.cached_tokens >= first.prompt_tokens + first.completion_tokens - 1


@pytest.mark.parametrize("streams", [False, True])
def test_a_turn_that_an_update_aborts_is_continued_from_its_tokens(
    make: Callable[..., FakeServer], tiny_llama: Path, streams: bool
) -> None:
    server = make(step_s=0.02)
    client = SGLangClient(server.url)
    with serving(server) as sessions:
        session = sessions.create()
        seen: list[Any] = []

        async def story() -> Any:
            turn = asyncio.ensure_future(session.chat(ask(max_new_tokens=30), seen.append if streams else None))
            await a_few_tokens(seen, [server], streams=streams)
            await asyncio.to_thread(client.send, build_pause("abort"))
            await asyncio.sleep(0.1)
            assert not turn.done()
            await asyncio.to_thread(client.send, build_set_version("5@abcd"))
            await asyncio.to_thread(client.send, build_continue())
            return await turn

        turn = run(story())
        versions = turn.choices[0].weight_versions
        assert len(turn.choices[0].token_ids) == len(versions) == 30
        assert set(versions) == {0, 5} if streams else versions[-1] == 5
        assert sorted(versions) == list(versions)
        assert paths(server, "/generate") == 2
        (trajectory,) = session.trajectories()
        check_log_probs([trajectory], tiny_llama)
        assert told_tokens(seen) == turn.choices[0].token_ids[: len(told_tokens(seen))]


def test_a_turn_waits_while_servers_are_paused(fake: FakeServer) -> None:
    client = SGLangClient(fake.url)
    with serving(fake) as sessions:
        session = sessions.create()

        async def story() -> Any:
            await asyncio.to_thread(client.send, build_pause("retract"))
            turn = asyncio.ensure_future(session.chat(ask()))
            await asyncio.sleep(0.2)
            assert not turn.done()
            await asyncio.to_thread(client.send, build_continue())
            return await turn

        assert len(run(story()).choices[0].token_ids) == 8


@pytest.mark.parametrize("streams", [False, True])
def test_a_turn_whose_server_dies_is_generated_elsewhere(
    make: Callable[..., FakeServer], tiny_llama: Path, streams: bool
) -> None:
    servers = [make(step_s=0.02), make(step_s=0.02, seed=1)]
    with serving(*servers) as sessions:
        session = sessions.create()
        seen: list[Any] = []

        async def story() -> Any:
            turn = asyncio.ensure_future(session.chat(ask(max_new_tokens=20), seen.append if streams else None))
            await a_few_tokens(seen, servers, streams=streams)
            dying = next(server for server in servers if paths(server, "/generate"))
            await asyncio.to_thread(dying.stop)
            return await turn

        turn = run(story())
        assert len(turn.choices[0].token_ids) == 20
        assert len(sessions.model.pool.healthy) == 1
        check_log_probs(session.trajectories(), tiny_llama)
        if streams:  # what the client has seen stays
            assert turn.choices[0].token_ids[: len(told_tokens(seen))] == told_tokens(seen)


def test_a_connection_that_breaks_is_no_dead_server(fake: FakeServer, tiny_llama: Path) -> None:
    with serving(fake) as sessions:
        session = sessions.create()
        fake.arm(Fault(path="/generate", action="drop", at="handled"))
        turn = run(session.chat(ask()))
        assert len(turn.choices[0].token_ids) == 8
        assert len(sessions.model.pool.healthy) == 1
        assert len(session.trajectories()) == 1  # the lost answer is thrown away
        run(asyncio.sleep(0.05))
        assert paths(fake, "/abort_request") == 1
        fake.arm(Fault(path="/generate", action="drop", at="handled", times=0))
        with pytest.raises(ServerError, match="3 servers failed on this turn"):
            run(session.chat(ask("fox")))
        fake.disarm()
        run(session.chat(ask("fox")))


def test_a_turn_that_nobody_waits_for_is_aborted_on_the_server(make: Callable[..., FakeServer]) -> None:
    server = make(step_s=0.02)
    with serving(server) as sessions:
        session = sessions.create()

        async def leave(how: Callable[[Any], Any]) -> None:
            turn = asyncio.ensure_future(session.chat(ask(max_new_tokens=1000)))
            begun = paths(server, "/generate")
            while paths(server, "/generate") == begun:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            aborts = paths(server, "/abort_request")
            done = how(turn)
            if done is not None:
                await done
            await asyncio.wait([turn])
            deadline = time.monotonic() + 10
            while paths(server, "/abort_request") == aborts:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.005)

        run(leave(lambda turn: turn.cancel() and None))
        assert session.trajectories() == []
        run(leave(lambda _: sessions.delete(session.id)))


def test_requests_wait_for_a_server_and_the_wait_counts(make: Callable[..., FakeServer]) -> None:
    server = make(step_s=0.01)
    with serving(server, max_in_flight=2, max_waiting=3) as sessions:
        session = sessions.create()

        async def story() -> list[Any]:
            turns = [asyncio.ensure_future(session.chat(ask(str(i), max_new_tokens=20))) for i in range(6)]
            done = await asyncio.gather(*turns, return_exceptions=True)
            return list(done)

        done = run(story())
        assert [type(each).__name__ for each in done] == ["Turn"] * 5 + ["OverloadedError"]
        assert isinstance(done[-1], OverloadedError)
        assert done[-1].retry_after_s > 0
        assert sessions.model.generator.slots.in_flight == sessions.model.generator.slots.waiting == 0
    with serving(server, max_in_flight=1, turn_timeout_s=0.4) as sessions:
        session = sessions.create()

        async def too_slow() -> list[Any]:
            turns = [session.chat(ask(str(i), max_new_tokens=1000)) for i in range(2)]
            return list(await asyncio.gather(*turns, return_exceptions=True))

        assert [type(each) for each in run(too_slow())] == [ServerTimeoutError] * 2
        run(session.chat(ask(max_new_tokens=2)))


def test_turns_of_a_conversation_go_to_one_server_and_sessions_to_all(make: Callable[..., FakeServer]) -> None:
    servers = [make(), make(seed=1)]
    with serving(*servers) as sessions:

        async def talk(session: Session) -> None:
            messages: list[Any] = [user("dog")]
            for _ in range(4):
                turn = await session.chat(ChatRequest(messages=tuple(messages), sampling={"max_new_tokens": 3}))
                messages.extend([dict(turn.choices[0].message), user("x")])

        async def all_at_once() -> None:
            await asyncio.gather(*(talk(sessions.create()) for _ in range(8)))

        run(all_at_once())
        assert [paths(server, "/generate") for server in servers] == [16, 16]


def test_a_request_that_the_servers_reject_is_an_error_and_the_session_stays_usable(fake: FakeServer) -> None:
    with serving(fake) as sessions:
        session = sessions.create()
        fake.arm(Fault(path="/generate", action="refuse", status=400, message="no such thing"))
        with pytest.raises(RequestRejectedError, match="no such thing"):
            run(session.chat(ask()))
        with pytest.raises(ConfigError, match="stop_token_ids holds 9999"):
            run(session.chat(ask(stop_token_ids=[9999])))
        assert run(session.chat(ask())).completion_tokens == 8


def test_without_a_server_a_turn_waits_and_then_says_why(make: Callable[..., FakeServer]) -> None:
    server = make()
    with serving(server, no_server_wait_s=0.5) as sessions:
        session = sessions.create()
        server.stop()
        with pytest.raises(ServerError, match="no server is left, the turn was not generated"):
            run(session.chat(ask()))


def test_keys_are_sent_to_the_servers(make: Callable[..., FakeServer]) -> None:
    server = make(api_key="secret")
    with serving(server, client=ClientConfig(api_key="secret")) as sessions:
        assert run(sessions.create().chat(ask())).completion_tokens == 8


def test_a_turn_on_half_updated_weights_is_generated_again(make: Callable[..., FakeServer]) -> None:
    server = make(step_s=0.01)
    client = SGLangClient(server.url)
    with serving(server) as sessions:
        session = sessions.create()

        def heal() -> None:
            time.sleep(0.4)
            client.send(build_set_version("3@abcd"))

        async def story() -> Any:
            await asyncio.to_thread(client.send, build_set_version("dirty-3@abcd"))
            threading.Thread(target=heal).start()
            return await session.chat(ask(max_new_tokens=30))

        assert set(run(story()).choices[0].weight_versions) == {3}
