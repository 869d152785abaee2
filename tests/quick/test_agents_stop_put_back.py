"""Clients that put back the stop string which ended an answer: the model has sampled it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.agent_kit import Sampled, chat, check_recorded, scripted, user
from tests.matrix.tokenizer_kinds import make_tokenizer
from tests.quick.agent_templates import QWEN3

STOP = "</code>"


@pytest.fixture
def talk() -> Any:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    ids = tuple(tokenizer("<code>\nx = 2\n</code>", add_special_tokens=False)["input_ids"])
    sessions, model = scripted(tokenizer, lambda _: Sampled(ids, matched=STOP))
    session = sessions.create()
    first = ask(session, [user("2 + 3?")])
    assert first == "<code>\nx = 2\n"
    return session, first, model


def ask(session: Any, messages: list[dict[str, Any]]) -> str:
    return str(chat(session, messages, sampling={"stop": [STOP]}).choices[0].message["content"])


@pytest.mark.parametrize("end", ["", STOP, f"{STOP}\n"])
def test_an_answer_with_or_without_its_stop_string_continues_its_trajectory(talk: Any, end: str) -> None:
    session, first, model = talk
    ask(session, [user("2 + 3?"), {"role": "assistant", "content": first + end}, user("Go on.")])
    (whole,) = session.trajectories()
    check_recorded([whole], model.calls)


@pytest.mark.parametrize("end", ["</code", f"{STOP}!", f"{STOP}{STOP}"])
def test_anything_else_behind_an_answer_makes_another_message_of_it(talk: Any, end: str) -> None:
    session, first, model = talk
    ask(session, [user("2 + 3?"), {"role": "assistant", "content": first + end}, user("Go on.")])
    assert len(session.trajectories()) == 2
    check_recorded(session.trajectories(), model.calls)


@pytest.mark.parametrize(("end", "sequences"), [("", 1), (STOP, 2)])
def test_a_second_stop_string_behind_one_that_was_kept_makes_another_message(end: str, sequences: int) -> None:
    tokenizer = make_tokenizer("byte-level BPE", QWEN3)
    ids = tuple(tokenizer(f"x = 2{STOP}", add_special_tokens=False)["input_ids"])
    sessions, model = scripted(tokenizer, lambda _: Sampled(ids, matched=STOP))
    session = sessions.create()
    sampling = {"stop": [STOP], "no_stop_trim": True}
    first = chat(session, [user("2 + 3?")], sampling=sampling).choices[0].message["content"]
    assert first == f"x = 2{STOP}"
    talk = [user("2 + 3?"), {"role": "assistant", "content": first + end}, user("Go on.")]
    chat(session, talk, sampling=sampling)
    assert len(session.trajectories()) == sequences
    check_recorded(session.trajectories(), model.calls)
