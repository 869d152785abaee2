"""Rewards, infos and tags: what is taken, what is refused, and that HTTP can tell all that was taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.agent_runs import ask_async, says
from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import AgentCollector, AgentGateway, ConfigError
from torchrl_sglang.agents.collector.rewards import read_last_line
from torchrl_sglang.agents.gateway import AgentSession


@pytest.fixture(scope="module")
def gateway(tiny_llama: Path) -> Iterator[AgentGateway]:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server, AgentGateway(server.url) as gateway:
        yield gateway


def get(session: AgentSession, path: str = "") -> Any:
    url = session.base_url.removesuffix("/v1") + path
    answer = httpx.get(url, headers={"Authorization": f"Bearer {session.api_key}"}, verify=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.array([0.25]), 0.25),
        (torch.tensor([[1.5]], requires_grad=True), 1.5),
    ],
)
def test_a_reward_is_any_number(gateway: AgentGateway, given: Any, value: float) -> None:
    session = gateway.create_session()
    assert gateway.reward(session.id, given).reward == value
    assert get(session)["reward"] == value


@pytest.mark.parametrize(
    "given", [math.nan, -math.inf, 10**400, 1e39, "1", b"1", None, 1j, [1.0], np.array([1.0, 2.0]), torch.zeros(0)]
)
def test_a_reward_that_can_not_be_trained_on_is_refused_and_the_session_stays_usable(
    gateway: AgentGateway, given: Any
) -> None:
    session = gateway.create_session()
    with pytest.raises(ConfigError, match="the reward"):
        gateway.reward(session.id, given)
    assert gateway.get(session.id).status == "active"


def test_infos_and_tags_become_json(gateway: AgentGateway) -> None:
    given = {"a": np.float32(0.5), "b": np.arange(2), "c": torch.tensor(1), "d": (1, None), "e": {"f": np.bool_(True)}}
    session = gateway.create_session(tags=given)
    gateway.reward(session.id, 1.0, given)
    said = get(session)
    assert said["info"] == said["tags"] == {"a": 0.5, "b": [0, 1], "c": 1, "d": [1, None], "e": {"f": True}}
    assert get(session, "/trajectories") == []


DEEP: dict[str, Any] = {}
DEEP["again"] = DEEP


NO_JSON = [{"x": object()}, {"x": {"y": math.nan}}, {"x": {1}}, {"x": b"a"}, {(1,): 1}, DEEP, [1]]


@pytest.mark.parametrize("given", NO_JSON)
def test_what_json_can_not_hold_is_refused_when_it_is_given(gateway: AgentGateway, given: Any) -> None:
    session = gateway.create_session()
    with pytest.raises(ConfigError, match="info"):
        gateway.reward(session.id, 1.0, given)
    assert gateway.get(session.id).status == "active"
    with pytest.raises(ConfigError, match="tags"):
        gateway.create_session(tags=given)


def test_a_session_is_named_by_its_id(gateway: AgentGateway) -> None:
    session: Any = gateway.create_session()
    for call in (gateway.get, gateway.trajectories, gateway.delete):
        with pytest.raises(ConfigError, match=r"by its id, a string such as session\.id"):
            call(session)


def test_infos_of_a_batch_are_json_and_a_numpy_bool_is_right_or_wrong(gateway: AgentGateway) -> None:
    rewards = iter([0.0, 1.0])

    async def agent(task: str, base_url: str, api_key: str) -> Any:
        await ask_async(base_url, api_key, [says(task)])
        reward = next(rewards)
        return {"reward": np.float64(reward), "info": {"right": np.bool_(reward > 0), "steps": np.int32(3)}}

    with AgentCollector(gateway, agent, ["a"], group_size=2) as collector:
        (batch,) = collector
    assert batch["next", "right"].flatten().tolist() == [bool(each) for each in batch["next", "reward"].flatten()]
    assert [each["steps"] for each in batch["info"]] == [3, 3]
    assert {type(each["right"]) for each in batch["info"]} == {bool}


def test_an_info_that_json_can_not_hold_fails_its_run_alone(gateway: AgentGateway) -> None:
    rewards = iter([0.0, 1.0, 2.0])

    async def agent(task: str, base_url: str, api_key: str) -> Any:
        await ask_async(base_url, api_key, [says(task)])
        return {"reward": 1.0, "info": {"x": object()}} if task == "bad" else next(rewards)

    with AgentCollector(gateway, agent, ["bad", "good"], group_size=2) as collector:
        (batch,) = collector
        (failure, *_) = collector.failures
    assert list(batch["query"]) == ["good", "good"]
    assert failure.kind == "bad reward"
    assert "info['x'] is object, which JSON can't hold" in failure.message


@pytest.mark.parametrize(("line", "value"), [("True", 1.0), ("false", 0.0), ("TRUE ", 1.0)])
def test_a_program_may_print_whether_it_was_right(line: str, value: float) -> None:
    reward = read_last_line(f"the answer is 7\n{line}\n")
    assert reward is not None
    assert reward.value == value
