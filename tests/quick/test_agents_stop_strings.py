"""Stop strings that lie across the place where an answer was interrupted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.agent_kit import Sampled, ScriptedGenerator, chat, scripted, user
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from torchrl_sglang.agents.generated import Generated
from torchrl_sglang.agents.types import Progress

END = "<|im_end|>"


class Interrupted(ScriptedGenerator):
    """A model whose answers were interrupted, so that no server saw a stop string whole."""

    async def generate(self, *given: Any, on_tokens: Any = None, **named: Any) -> Generated:
        def report(so_far: Generated) -> None:
            on_tokens(replace(so_far, resumes=1))

        made = await super().generate(*given, on_tokens=report if on_tokens is not None else None, **named)
        return replace(made, resumes=1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = make_tokenizer("byte-level BPE")
    tokenizer.chat_template = TEMPLATES["ChatML"].source
    return tokenizer


def letters(tokenizer: Any, text: str) -> tuple[int, ...]:
    """A token per character."""
    return tuple(i for letter in text for i in tokenizer(letter, add_special_tokens=False)["input_ids"])


def session_of(tokenizer: Any, *answers: Sampled) -> Any:
    waiting = list(answers)
    sessions, _ = scripted(tokenizer, lambda _: waiting.pop(0))
    sessions.model.generator = Interrupted(lambda _: waiting.pop(0))  # type: ignore[assignment]
    return sessions.create()


@pytest.mark.parametrize("streams", [False, True])
def test_the_answer_ends_with_the_stop_string_and_what_follows_is_not_recorded(tokenizer: Any, streams: bool) -> None:
    ids = letters(tokenizer, "think\nObs: made up")
    session = session_of(tokenizer, Sampled(ids, finish_reason="length"))
    reports: list[Any] = []
    turn = chat(session, [user("q")], reports.append if streams else None, sampling={"stop": ["XX", "\nObs:"]})
    choice = turn.choices[0]
    kept = letters(tokenizer, "think\nObs:")
    assert choice.message["content"] == "think"
    assert (choice.finish_reason, choice.stop) == ("stop", "\nObs:")
    assert choice.token_ids == kept
    assert len(choice.log_probs) == len(choice.weight_versions) == len(kept)
    (trajectory,) = session.trajectories()
    assert trajectory.token_ids[-len(kept) :] == kept
    assert sum(trajectory.loss_mask) == len(kept)
    if streams:
        told = Progress.joined(reports)
        assert len(told.token_ids) <= len(kept)
        assert "think".startswith(told.content)


def test_a_stop_string_ends_an_answer_before_its_least_number_of_tokens_as_on_a_server(tokenizer: Any) -> None:
    ids = letters(tokenizer, "a.b.c")
    session = session_of(tokenizer, Sampled(ids, finish_reason="length"))
    turn = chat(session, [user("q")], sampling={"stop": ["."], "min_tokens": 5, "max_tokens": 5})
    assert turn.choices[0].token_ids == ids[:2]


def test_an_answer_that_the_server_ended_at_its_stop_string_stays_as_it_is(tokenizer: Any) -> None:
    ids = letters(tokenizer, "a b.")
    session = session_of(tokenizer, Sampled(ids, finish_reason="stop", matched="."))
    turn = chat(session, [user("q")], sampling={"stop": ["."]})
    assert turn.choices[0].token_ids == ids
    assert turn.choices[0].message["content"] == "a b"


def test_an_answer_without_a_stop_string_keeps_its_end(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids(END)
    ids = (*letters(tokenizer, "a b"), end)
    session = session_of(tokenizer, Sampled(ids, finish_reason="stop", matched=end))
    turn = chat(session, [user("q")], sampling={"stop": ["c"]})
    assert turn.choices[0].token_ids == ids
    assert turn.choices[0].stop is None


@pytest.mark.parametrize("stops", [{"stop": ["Obs:"]}, {"stop_regex": ["Ob.:"]}])
def test_tokens_behind_the_stop_string_that_come_with_half_a_character_are_not_told(tokenizer: Any, stops: Any) -> None:
    begun, rest = letters(tokenizer, "a Ob"), letters(tokenizer, "s: 犬")[:-1]
    ids = (*begun, *rest)
    session = session_of(tokenizer, Sampled(ids, finish_reason="length"))

    async def generate(*given: Any, on_tokens: Any = None, **named: Any) -> Generated:
        made = Generated(output_ids=list(begun), log_probs=[-0.5] * len(begun), versions=[0] * len(begun))
        on_tokens(made)
        made = replace(made, output_ids=list(ids), log_probs=[-0.5] * len(ids), versions=[0] * len(ids), resumes=1)
        on_tokens(made)  # the events of the second part came together
        return replace(made, finish_reason="length")

    session._model.generator.generate = generate
    reports: list[Any] = []
    choice = chat(session, [user("q")], reports.append, sampling=stops).choices[0]
    assert choice.token_ids == letters(tokenizer, "a Obs:")
    told = Progress.joined(reports).token_ids
    assert told == choice.token_ids[: len(told)]
