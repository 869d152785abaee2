"""The unmodified ``openai`` package talks to a gateway before a fake server; what it saw is what was recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from tests.fake_sglang import FakeServer
from torchrl_sglang.agents.gateway import AgentGateway, AgentSession
from torchrl_sglang.agents.settings import SessionSettings

HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def gateway(fake: FakeServer) -> Iterator[AgentGateway]:
    with AgentGateway(fake.url, settings=SessionSettings(generation={"max_new_tokens": 8})) as gateway:
        yield gateway


@pytest.fixture
def session(gateway: AgentGateway) -> AgentSession:
    return gateway.create_session(tags={"task": "greet"})


@pytest.fixture
def client(session: AgentSession) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=session.base_url, api_key=session.api_key) as client:
        yield client


@pytest.fixture
def tokenizer(fake: FakeServer) -> Any:
    return AutoTokenizer.from_pretrained(fake.settings.model_path)


def sampled(trajectory: Any) -> list[list[int]]:
    """The runs of sampled tokens of a trajectory."""
    runs: list[list[int]] = []
    before = 0
    for token, mask in zip(trajectory.token_ids, trajectory.loss_mask, strict=True):
        if mask and not before:
            runs.append([])
        if mask:
            runs[-1].append(token)
        before = mask
    return runs


def calls_to(fake: FakeServer, path: str) -> list[Any]:
    return [event["body"] for event in fake.events if event["path"] == path]


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_two_turns_are_one_trajectory_of_what_was_sent_and_sampled(
    gateway: AgentGateway, fake: FakeServer, session: AgentSession, client: openai.OpenAI
) -> None:
    first = client.chat.completions.create(model="m", messages=HI, logprobs=True, temperature=0.7)
    assert first.choices[0].logprobs is not None
    messages = [*HI, first.choices[0].message, {"role": "user", "content": "More"}]
    second = client.chat.completions.create(model="m", messages=messages, logprobs=True, temperature=0.7)
    [leaf] = gateway.trajectories(session.id)
    sent = [body["input_ids"][0] for body in calls_to(fake, "/generate")]
    assert sent[1] == list(leaf.token_ids[: len(sent[1])])
    assert sent[1][: len(sent[0])] == sent[0]
    assert leaf.token_ids[len(sent[0]) :][: len(sampled(leaf)[0])] == tuple(sampled(leaf)[0])
    log_probs = [value for value, mask in zip(leaf.log_probs, leaf.loss_mask, strict=True) if mask]
    seen = [each.logprob for answer in (first, second) for each in answer.choices[0].logprobs.content]  # type: ignore[union-attr]
    assert log_probs == pytest.approx(seen)
    assert first.usage is not None
    assert first.usage.prompt_tokens == len(sent[0])
    assert leaf.tags == {"task": "greet"}


def test_a_stream_joined_is_the_answer_that_was_recorded(
    gateway: AgentGateway, session: AgentSession, tokenizer: Any
) -> None:
    async def run() -> tuple[str, Any]:
        async with openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:
            stream = await client.chat.completions.create(
                model="m", messages=HI, stream=True, stream_options={"include_usage": True}, max_completion_tokens=24
            )
            text, usage = "", None
            async for chunk in stream:
                usage = chunk.usage or usage
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
            return text, usage

    text, usage = asyncio.run(run())
    [leaf] = gateway.trajectories(session.id)
    [ids] = sampled(leaf)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert usage.completion_tokens == len(ids) == 24
    assert leaf.messages[-1]["content"] == text


def test_several_answers_are_branches(gateway: AgentGateway, session: AgentSession, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=HI, n=3, temperature=1.5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(gateway.trajectories(session.id)) == 3


def test_a_completion_continues_token_ids(gateway: AgentGateway, session: AgentSession, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="m", prompt=[5, 6, 7], max_tokens=4, logprobs=2)
    [leaf] = gateway.trajectories(session.id)
    assert leaf.token_ids[:3] == (5, 6, 7)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(list(leaf.log_probs[3:]))


def test_the_responses_api_is_recorded_as_one_conversation(
    gateway: AgentGateway, session: AgentSession, client: openai.OpenAI
) -> None:
    first = client.responses.create(model="m", input="Hi", instructions="Be kind.")
    asked: dict[str, Any] = {"model": "m", "input": "More", "previous_response_id": first.id}
    events = list(client.responses.create(**asked, instructions="Be kind.", stream=True))
    final = events[-1].response
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == final.output_text
    [leaf] = gateway.trajectories(session.id)
    assert [message["role"] for message in leaf.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert leaf.messages[2]["content"] == first.output_text
    assert leaf.messages[4]["content"] == final.output_text


def test_the_clients_own_exceptions_tell_what_is_wrong(
    gateway: AgentGateway, fake: FakeServer, session: AgentSession, client: openai.OpenAI
) -> None:
    def ask(**fields: Any) -> Any:
        return client.with_options(max_retries=0).chat.completions.create(**{"model": "m", "messages": HI, **fields})

    with pytest.raises(openai.BadRequestError, match="unknown field 'temprature'"):
        ask(extra_body={"temprature": 1})
    with pytest.raises(openai.BadRequestError) as too_long:
        ask(messages=[{"role": "user", "content": "Hi " * 5000}])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="deterministic"):
        ask(seed=1)
    with pytest.raises(openai.AuthenticationError, match="another one"):
        client.with_options(api_key="sk-wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="there is no session"):
        openai.OpenAI(base_url=session.base_url.replace(session.id, "nobody"), api_key="x").models.list()
    assert calls_to(fake, "/generate") == []
    assert ask().choices[0].message.content is not None, "the session stays usable"


def test_a_finished_session_is_not_asked_again(
    gateway: AgentGateway, session: AgentSession, client: openai.OpenAI
) -> None:
    client.chat.completions.create(model="m", messages=HI)
    gateway.reward(session.id, 1.0, {"solved": True})
    started = time.monotonic()
    with pytest.raises(openai.ConflictError, match="takes no more requests"):
        client.chat.completions.create(model="m", messages=HI)
    assert time.monotonic() - started < 10
    [leaf] = gateway.trajectories(session.id)
    assert (leaf.reward, leaf.info, leaf.status) == (1.0, {"solved": True}, "finished")


def test_a_client_that_closes_its_stream_ends_the_generation(make: Callable[..., FakeServer]) -> None:
    slow = make(step_s=0.05)
    with AgentGateway(slow.url) as gateway:
        session = gateway.create_session()
        with openai.OpenAI(base_url=session.base_url, api_key=session.api_key) as client:
            stream = client.chat.completions.create(model="m", messages=HI, stream=True, max_tokens=1000)
            next(iter(stream))
            assert gateway.get(session.id).in_flight == 1
            stream.close()
        wait_for(lambda: calls_to(slow, "/abort_request"), "the server was not told to abort")
        wait_for(lambda: gateway.get(session.id).in_flight == 0, "the turn goes on")
        assert gateway.trajectories(session.id) == []


def test_a_client_that_gives_up_on_an_answer_ends_the_generation(make: Callable[..., FakeServer]) -> None:
    slow = make(step_s=0.05)
    with AgentGateway(slow.url) as gateway:
        session = gateway.create_session()
        impatient = openai.OpenAI(base_url=session.base_url, api_key=session.api_key, timeout=0.5, max_retries=0)
        with impatient as client, pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="m", messages=HI, max_tokens=1000)
        wait_for(lambda: calls_to(slow, "/abort_request"), "the server was not told to abort")
        assert gateway.trajectories(session.id) == []


def test_a_session_is_used_from_other_programs_over_http(gateway: AgentGateway) -> None:
    with httpx.Client(base_url=gateway.url, trust_env=False) as http:
        made = http.post("/sessions", json={"tags": {"task": 1}}).json()
        headers = {"authorization": f"Bearer {made['api_key']}"}
        with openai.OpenAI(base_url=made["base_url"], api_key=made["api_key"]) as client:
            client.chat.completions.create(model="m", messages=HI)
        path = f"/sessions/{made['id']}"
        assert http.post(f"{path}/reward", json={"reward": 0.5}, headers=headers).json()["status"] == "finished"
        [leaf] = http.get(f"{path}/trajectories", headers=headers).json()
        lengths = {len(leaf[name]) for name in ("token_ids", "loss_mask", "log_probs", "weight_versions")}
        assert len(lengths) == 1
        assert leaf["reward"] == 0.5
        [same] = gateway.trajectories(made["id"])
        assert list(same.token_ids) == leaf["token_ids"]
        assert http.delete(path, headers=headers).status_code == 200
        assert http.get(path, headers=headers).status_code == 404
