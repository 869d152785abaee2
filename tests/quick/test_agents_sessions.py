"""Sessions: which requests are the same, how a session ends, what it refuses."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from tests.agent_kit import Sampled, chat, run, says, scripted, user
from tests.matrix.combinations import TOOLS
from tests.matrix.templates import TEMPLATES
from tests.matrix.tokenizer_kinds import make_tokenizer
from tests.quick.agent_templates import CALL
from torchrl_sglang.agents.types import ChatRequest
from torchrl_sglang.errors import (
    ConfigError,
    ContextLengthError,
    OverloadedError,
    SessionFinishedError,
    SessionKeyError,
    UnknownSessionError,
)

ASK = ChatRequest(messages=(user("dog"),))


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer("byte-level BPE", TEMPLATES["thinking"].source)


@pytest.fixture
def numbered(tokenizer: Any) -> Any:
    """Sessions whose model answers 1, 2, 3..."""
    count = iter(range(1, 1000))
    return scripted(tokenizer, lambda _: says(tokenizer, str(next(count)), "<|im_end|>"))


def test_an_equal_request_is_sampled_anew_and_is_a_branch(numbered: Any) -> None:
    sessions, _ = numbered
    session = sessions.create()
    answers = [chat(session, [user("dog")]).choices[0].message["content"] for _ in range(3)]
    assert answers == ["1", "2", "3"]
    assert len(session.trajectories()) == 3


def test_equal_answers_of_the_same_weights_are_one_segment(tokenizer: Any) -> None:
    sessions, model = scripted(tokenizer, lambda _: says(tokenizer, "Yes.", "<|im_end|>"))
    session = sessions.create()
    for _ in range(3):
        chat(session, [user("dog")], sampling={"temperature": 0})
    assert len(session.trajectories()) == 1
    model.version = 1
    chat(session, [user("dog")], sampling={"temperature": 0})
    assert [trajectory.weight_versions[-1] for trajectory in session.trajectories()] == [0, 1]


def test_a_retry_gets_the_recorded_answer_until_the_conversation_goes_on(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create()
    first = run(session.chat(ASK))
    retry = run(session.chat(replace(ASK, attempt=1)))
    assert (retry.id, retry.choices, retry.is_repeated) == (first.id, first.choices, True)
    assert not first.is_repeated
    chat(session, [user("dog"), first.choices[0].message, user("fox")])
    # The agent has seen the answer, so this is a new request, whatever its first attempt met with.
    assert not run(session.chat(replace(ASK, attempt=1))).is_repeated
    assert model.started == 3


def test_a_retry_of_another_request_is_generated(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create()
    run(session.chat(ASK))
    assert not run(session.chat(replace(ASK, attempt=1, sampling={"temperature": 0.5}))).is_repeated
    assert model.started == 2


def test_requests_with_one_key_are_one_request(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create()
    keyed = replace(ASK, idempotency_key="a")
    first = run(session.chat(keyed))
    chat(session, [user("dog"), first.choices[0].message, user("fox")])
    assert run(session.chat(keyed)).choices == first.choices  # also after the conversation has gone on
    with pytest.raises(ConfigError, match="idempotency key 'a' was sent with another request"):
        run(session.chat(replace(keyed, messages=(user("fox"),))))
    assert not run(session.chat(replace(ASK, idempotency_key="b"))).is_repeated
    assert model.started == 3
    assert session.info().turns == 3


def test_retries_join_a_turn_under_way_and_it_ends_when_nobody_waits(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create()

    async def story() -> None:
        model.gate = asyncio.Event()
        first = asyncio.ensure_future(session.chat(ASK))
        await asyncio.sleep(0)
        reports: list[Any] = []
        second = asyncio.ensure_future(session.chat(replace(ASK, attempt=1), reports.append))
        await asyncio.sleep(0)
        first.cancel()  # the client has closed the first connection
        await asyncio.wait([first])
        assert session.info().in_flight == 1
        model.gate.set()
        assert (await second).is_repeated
        assert model.started == 1
        model.gate.clear()
        third = asyncio.ensure_future(session.chat(ASK))
        await asyncio.sleep(0.001)
        third.cancel()
        await asyncio.wait([third])
        await asyncio.sleep(0)
        assert session.info().in_flight == 0
        model.gate.set()
        assert not (await session.chat(replace(ASK, attempt=0))).is_repeated

    run(story())
    assert model.started == 3
    assert len(session.trajectories()) == 2  # the turn that nobody waited for left nothing


def test_a_retry_does_not_join_a_turn_that_is_being_aborted(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create()

    async def story() -> None:
        model.gate = asyncio.Event()
        first = asyncio.ensure_future(session.chat(ASK))
        await asyncio.sleep(0.001)
        first.cancel()
        await asyncio.sleep(0)  # it has told its turn to end, which has not done so yet
        assert session.info().in_flight == 1
        model.gate.set()
        assert not (await session.chat(replace(ASK, attempt=1))).is_repeated

    run(story())
    assert len(session.trajectories()) == 1


def test_an_answer_that_was_not_delivered_is_for_the_next_equal_request(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create()
    lost = run(session.chat(ASK))
    session.undelivered(lost)
    assert run(session.chat(ASK)).choices == lost.choices
    assert not run(session.chat(ASK)).is_repeated
    assert model.started == 2


def test_choices_are_siblings_and_the_one_that_the_agent_takes_goes_on(numbered: Any) -> None:
    sessions, _ = numbered
    session = sessions.create()
    turn = chat(session, [user("dog")], sampling={"n": 3})
    assert sorted(choice.message["content"] for choice in turn.choices) == ["1", "2", "3"]
    chat(session, [user("dog"), turn.choices[1].message, user("fox")])
    lengths = [sum(trajectory.loss_mask) for trajectory in session.trajectories()]
    assert sorted(lengths) == [2, 2, 4]
    assert session.info().sampled_tokens == 8


def test_a_choice_that_fails_leaves_nothing_of_its_turn(tokenizer: Any) -> None:
    count = iter(range(10))

    def answer(_: list[int]) -> Sampled:
        if next(count) == 1:
            raise OverloadedError("full")
        return says(tokenizer, "Yes.", "<|im_end|>")

    sessions, _ = scripted(tokenizer, answer)
    session = sessions.create()
    with pytest.raises(OverloadedError):
        chat(session, [user("dog")], sampling={"n": 2})
    assert session.trajectories() == []
    assert session.info().turns == session.info().in_flight == 0
    assert len(chat(session, [user("dog")], sampling={"n": 2}).choices) == 2


# ------------------------------------------------------------------ the end of a session


def test_a_reward_finishes_a_session(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create(tags={"task": 7})

    async def story() -> None:
        model.gate = asyncio.Event()
        late = asyncio.ensure_future(session.chat(ASK))
        await asyncio.sleep(0.001)
        session.reward(0.5, {"why": "half"})
        with pytest.raises(SessionFinishedError, match="it has its reward"):
            await late
        model.gate.set()

    chat(session, [user("dog")])
    run(story())
    session.reward(0.5, {"why": "half"})  # a client's retry
    with pytest.raises(SessionFinishedError):
        session.reward(1.0)
    with pytest.raises(SessionFinishedError):
        chat(session, [user("dog")])
    (trajectory,) = session.trajectories()
    assert (trajectory.reward, trajectory.info, trajectory.tags) == (0.5, {"why": "half"}, {"task": 7})
    assert (trajectory.status, trajectory.session) == ("finished", session.id)
    assert trajectory.as_json()["token_ids"] == list(trajectory.token_ids)


def test_a_turn_of_a_session_that_is_deleted_ends(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create()

    async def story() -> None:
        model.gate = asyncio.Event()
        turn = asyncio.ensure_future(session.chat(ASK))
        await asyncio.sleep(0.001)
        await sessions.delete(session.id)
        with pytest.raises(UnknownSessionError, match="was deleted"):
            await turn

    run(story())


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "1", None])
def test_a_reward_that_is_no_number_is_refused(numbered: Any, reward: Any) -> None:
    session = numbered[0].create()
    with pytest.raises(ConfigError, match="finite number"):
        session.reward(reward)
    assert session.status == "active"


def test_a_silent_session_expires_and_says_so(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    expired: list[Any] = []
    sessions, _ = scripted(tokenizer, lambda _: says(tokenizer, "Yes.", "<|im_end|>"))
    sessions._on_expired = expired.append
    silent, busy = sessions.create(ttl_s=0.01), sessions.create()
    chat(silent, [user("dog")])
    time.sleep(0.02)
    assert sessions.expire() == [silent] == expired
    assert "expired" in caplog.text
    assert (silent.info().status, busy.info().status) == ("expired", "active")
    assert [trajectory.status for trajectory in silent.trajectories()] == ["expired"]
    with pytest.raises(SessionFinishedError, match="nothing was heard of it for 0.01 s"):
        chat(silent, [user("dog")])
    with pytest.raises(SessionFinishedError):
        silent.reward(1.0)


def test_a_session_for_which_something_is_generated_is_not_silent(numbered: Any) -> None:
    sessions, model = numbered
    session = sessions.create(ttl_s=0.01)

    async def story() -> None:
        model.gate = asyncio.Event()
        turn = asyncio.ensure_future(session.chat(ASK))
        await asyncio.sleep(0.03)
        assert sessions.expire() == []
        model.gate.set()
        await turn

    run(story())
    assert session.status == "active"


def test_sessions_are_found_by_id_and_key_and_bounded(tokenizer: Any) -> None:
    sessions, _ = scripted(tokenizer, lambda _: says(tokenizer, "Yes.", "<|im_end|>"), max_sessions=2)
    first, second = sessions.create(ttl_s=0.01), sessions.create()
    assert first.key != second.key
    assert sessions.get(first.id, key=first.key) is first
    for key in ("", "wrong", second.key, "ä"):
        with pytest.raises(SessionKeyError) as caught:
            sessions.get(first.id, key=key)
        assert first.key not in str(caught.value)
    with pytest.raises(UnknownSessionError):
        sessions.get("ses_none", key=first.key)
    second.reward(1.0)
    time.sleep(0.02)
    sessions.create()  # the expired one makes room, one with a reward does not
    with pytest.raises(UnknownSessionError):
        sessions.get(first.id)
    with pytest.raises(OverloadedError, match="as many as may be"):
        sessions.create()
    run(sessions.delete(second.id))
    sessions.create()
    assert len(sessions) == 2


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ChatRequest(messages=()), "messages is empty"),
        (ChatRequest(messages=({"role": "robot", "content": "x"},)), r"messages\[0\] has the role 'robot'"),
        (ChatRequest(messages=({"role": "user", "content": None},)), r"messages\[0\] has no content"),
        (
            ChatRequest(messages=(user("x"), {"role": "user", "content": [{"type": "video_url"}]})),
            r"messages\[1\].*text",
        ),
        (replace(ASK, sampling={"temprature": 1}), "Did you mean 'temperature'"),
        (replace(ASK, template_kwargs={"tokenize": True}), "template_kwargs"),
        (replace(ASK, top_logprobs=1000), "top_logprobs"),
        (replace(ASK, tool_choice="required"), "needs tools"),
        (replace(ASK, tool_choice={"function": {"name": "f"}}, tools=tuple(TOOLS)), "names the function 'f'"),
        (replace(ASK, tool_choice="sometimes", tools=tuple(TOOLS)), "tool_choice must be"),
    ],
)
def test_bad_requests_are_refused_and_the_session_stays_usable(
    numbered: Any, request_: ChatRequest, error: str
) -> None:
    sessions, model = numbered
    session = sessions.create()
    with pytest.raises(ConfigError, match=error):
        run(session.chat(request_))
    assert model.started == 0
    assert chat(session, [user("dog")]).choices[0].message["content"] == "1"


def test_a_conversation_beyond_the_context_is_refused_as_such(tokenizer: Any) -> None:
    sessions, model = scripted(tokenizer, lambda _: says(tokenizer, "Yes.", "<|im_end|>"))
    sessions.model.pool.context_length, sessions.model.pool.max_prompt_tokens = 40, 39  # type: ignore[misc]
    session = sessions.create()
    with pytest.raises(ContextLengthError, match="the conversation has .* tokens"):
        chat(session, [user("dog " * 60)])
    with pytest.raises(ContextLengthError, match="together more than the context of 40"):
        chat(session, [user("dog")], sampling={"max_new_tokens": 39})
    assert model.started == 0
    chat(session, [user("dog")])


# ------------------------------------------------------------------ tool choice


def test_calls_are_not_read_where_none_may_be_made(tokenizer: Any) -> None:
    sessions, _ = scripted(tokenizer, lambda _: says(tokenizer, CALL, "<|im_end|>"))
    session = sessions.create()
    turn = chat(session, [user("add")], tools=tuple(TOOLS), tool_choice="none")
    assert "tool_calls" not in turn.choices[0].message
    assert turn.choices[0].message["content"] == CALL
    assert turn.choices[0].finish_reason == "stop"


def test_one_call_is_returned_where_several_may_not_be_made(tokenizer: Any) -> None:
    sessions, model = scripted(tokenizer, lambda _: says(tokenizer, f"{CALL}\n{CALL}", "<|im_end|>"))
    session = sessions.create()
    turn = chat(session, [user("add")], tools=tuple(TOOLS), parallel_tool_calls=False)
    (call,) = turn.choices[0].message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "5"}
    chat(session, [user("add"), turn.choices[0].message, result], tools=tuple(TOOLS))
    assert len(model.calls) == 2
