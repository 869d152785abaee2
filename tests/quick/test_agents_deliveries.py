"""Answers that several requests waited for: one that reached a client is no lost answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.agent_kit import run, user
from torchrl_sglang.agents.types import ChatRequest

ASK = ChatRequest(messages=(user("dog"),))
RETRY = replace(ASK, attempt=1)


def text(turn: Any) -> str:
    return str(turn.choices[0].message["content"])


async def both(session: Any, model: Any) -> list[Any]:
    """A request and its retry, which waits for the same answer."""
    model.gate = asyncio.Event()
    waiting = [asyncio.ensure_future(session.chat(each)) for each in (ASK, RETRY)]
    await asyncio.sleep(0.001)
    model.gate.set()
    return list(await asyncio.gather(*waiting))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_client_that_leaves_as_its_retry_gets_the_answer_leaves_none_for_others(numbered: Any, lost: int) -> None:
    sessions, model = numbered
    session = sessions.create()
    turns = run(both(session, model))
    assert [text(turn) for turn in turns] == ["1", "1"]
    session.undelivered(turns[lost])
    assert text(run(session.chat(ASK))) == "2"
    assert len(session.trajectories()) == 2


def test_an_answer_that_reached_neither_is_kept_for_the_next_equal_request(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create()
    for turn in run(both(session, model)):
        session.undelivered(turn)
    assert [text(run(session.chat(ASK))) for _ in range(2)] == ["1", "2"]


def test_a_loss_that_is_noticed_after_the_retry_got_the_answer_does_not_matter(numbered: Any) -> None:
    sessions, _ = numbered
    session = sessions.create()
    first = run(session.chat(ASK))
    assert text(run(session.chat(RETRY))) == "1"
    session.undelivered(first)
    assert text(run(session.chat(ASK))) == "2"


def test_a_loss_of_the_retrys_answer_counts(numbered: Any) -> None:
    sessions, _ = numbered
    session = sessions.create()
    run(session.chat(ASK))
    session.undelivered(run(session.chat(RETRY)))
    assert text(run(session.chat(ASK))) == "1"
    assert text(run(session.chat(ASK))) == "2"
