"""Agents' requests where two parts meet: equal tokens under other settings, ids that are no token's, lost sessions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.agent_kit import run, user
from tests.agent_runs import ask, says
from tests.fake_sglang import FakeServer
from tests.quick.test_agents_generation import serving
from torchrl_sglang import AgentCollector, AgentGateway
from torchrl_sglang.agents.collector.task_stream import TaskStream
from torchrl_sglang.agents.types import ChatRequest


def greedy(**more: Any) -> ChatRequest:
    settings = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True, **more.pop("sampling", {})}
    return ChatRequest(messages=(user("dog"),), sampling=settings, **more)


def test_equal_tokens_are_answered_as_their_request_asks(fake: FakeServer) -> None:
    with serving(fake) as sessions:
        session = sessions.create()
        plain = run(session.chat(greedy())).choices[0]
        likely = run(session.chat(greedy(top_logprobs=2))).choices[0]
        assert likely.token_ids == plain.token_ids
        assert [len(each) for each in likely.top_log_probs] == [2] * 6
        assert len(session.trajectories()) == 1
        assert session.info().sampled_tokens == 6

        # a conversation that goes on from either of them is known to go on from both
        following = (user("dog"), plain.message, user("go on"))
        run(session.chat(ChatRequest(messages=following, sampling={"max_new_tokens": 2})))
        again = run(session.chat(greedy(top_logprobs=2, attempt=1)))
        assert not again.is_repeated
        assert len(session.trajectories()) == 1


@pytest.mark.parametrize("ids", [[-1], [10**30], [5, 2**31]])
def test_ids_that_are_no_tokens_are_refused(fake: FakeServer, ids: list[int]) -> None:
    with AgentGateway(fake.url) as gateway:
        answer = post(gateway, "/completions", {"model": "any", "prompt": ids, "max_tokens": 2})
        assert answer.status_code == 400, answer.text


def test_numbers_and_names_of_the_wrong_kind_are_refused(fake: FakeServer) -> None:
    with AgentGateway(fake.url) as gateway:
        asked = {"model": "any", "messages": [says("dog")], "temperature": 10**400}
        assert post(gateway, "/chat/completions", asked).status_code == 400
        asked = {"model": "any", "input": "dog", "previous_response_id": ["resp_1"]}
        assert post(gateway, "/responses", asked).status_code == 404


def post(gateway: AgentGateway, path: str, body: dict[str, Any]) -> httpx.Response:
    session = gateway.create_session()
    headers = {"Authorization": f"Bearer {session.api_key}"}
    return httpx.post(session.base_url + path, json=body, headers=headers, timeout=60, verify=False)


@pytest.mark.torchrl
def test_an_agent_that_deletes_its_session_is_a_failed_run(fake: FakeServer) -> None:
    def agent(task: str, base_url: str, api_key: str) -> float:
        ask(base_url, api_key, [says(task)])
        if task == "first":
            key = {"Authorization": f"Bearer {api_key}"}
            httpx.delete(base_url.removesuffix("/v1"), headers=key, verify=False).raise_for_status()
        return 1.0

    settings: dict[str, Any] = {"group_size": 1, "groups_per_batch": 1, "skip_equal": False}
    tasks = ["first", "second"]
    with AgentGateway(fake.url) as gateway, AgentCollector(gateway, agent, tasks, **settings) as collector:
        (batch,) = collector
        assert list(batch["query"]) == ["second"]
        (failure,) = collector.failures
        assert failure.kind == "gateway"
        assert "deleted" in failure.message


def test_a_task_that_is_taken_while_the_state_is_read_is_in_it_once() -> None:
    stream = TaskStream(["a", "b", "c"], epochs=1)
    stream.take()

    class Watched(set[int]):
        """Open tasks; while they are read, the agents' thread takes the next one."""

        def __or__(self, other: Any) -> Any:
            stream.take()
            return set(self) | other

    stream._open = Watched(stream._open)
    resumed = TaskStream(["a", "b", "c"], epochs=1)
    resumed.load_state_dict(stream.state_dict())
    assert [taken.task for taken in taken_all(resumed)] == ["a", "b", "c"]


def taken_all(stream: TaskStream) -> Iterator[Any]:
    while (task := stream.take()) is not None:
        yield task
