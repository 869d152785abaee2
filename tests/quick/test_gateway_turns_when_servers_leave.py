"""Agents' turns on a server that leaves: draining waits for them, and without it they are generated elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agent_kit import told_tokens
from tests.fake_sglang import FakeServer, Fault
from tests.quick.test_agents_elastic import busy_one, turn_while
from tests.quick.test_agents_generation import check_log_probs, paths, serving


@pytest.mark.parametrize("streams", [False, True])
def test_draining_waits_for_turns(make: Callable[..., FakeServer], streams: bool) -> None:
    servers = [make(step_s=0.02), make(step_s=0.02)]
    with serving(*servers) as sessions:
        session, pool = sessions.create(), sessions.model.pool

        def drain(busy: FakeServer) -> None:
            (client,) = [client for client in pool.clients if client.url == busy.url]
            assert client.num_generating == 1
            busy.arm(Fault(path="/v1/loads", action="refuse", times=0))  # what it says of its load does not matter
            pool.remove(busy.url)
            assert client.num_generating == 0

        turn, _ = turn_while(session, servers, drain, streams=streams)
        left = busy_one(servers)
        assert len(turn.choices[0].token_ids) == 40
        assert left.url not in {client.url for client in pool.clients}
        assert sum(paths(server, "/generate") for server in servers) == 1, "it was continued elsewhere"
        assert not paths(left, "/abort_request")


# A server that hangs is waited for: 15 s.
@pytest.mark.parametrize("streams", [pytest.param(False, marks=pytest.mark.slow), True])
def test_turns_on_a_server_that_hangs_are_cut_and_generated_elsewhere(
    make: Callable[..., FakeServer], tiny_llama: Path, streams: bool
) -> None:
    servers = [make(step_s=0.02), make(step_s=0.02)]
    with serving(*servers) as sessions:
        session, pool = sessions.create(), sessions.model.pool

        def cut(busy: FakeServer) -> None:
            busy.arm(Fault(path="/abort_request", action="freeze"))
            pool.remove(busy.url, drain=False)
            assert len(pool.clients) == 1

        begun = time.monotonic()
        turn, seen = turn_while(session, servers, cut, streams=streams)
        assert time.monotonic() - begun < 30, "not only when the connection times out"
        assert len(turn.choices[0].token_ids) == 40
        (trajectory,) = session.trajectories()
        check_log_probs([trajectory], tiny_llama)
        assert turn.choices[0].token_ids[: len(told_tokens(seen))] == told_tokens(seen)
