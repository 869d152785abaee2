"""The event loop in which a collector's agents run: what blocks it is named, and clean-ups end."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agent_runs import ask_async, says
from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import AgentCollector, AgentGateway, AgentsFailedError, ConfigError
from torchrl_sglang.agents.collector import loop_thread


@pytest.fixture(scope="module")
def gateway(tiny_llama: Path) -> Iterator[AgentGateway]:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server, AgentGateway(server.url) as gateway:
        yield gateway


def rising() -> Any:
    rewards = map(float, itertools.count())

    async def agent(task: Any, base_url: str, api_key: str) -> float:
        await ask_async(base_url, api_key, [says(str(task))])
        return next(rewards)

    return agent


def test_an_async_agent_that_blocks_all_others_is_named(
    gateway: AgentGateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_thread, "_BLOCKED_S", 1.5)
    monkeypatch.setattr(loop_thread, "_LOOK_AGAIN_S", 0.1)
    good = rising()

    def think() -> None:
        time.sleep(4)

    async def agent(task: Any, base_url: str, api_key: str) -> float:
        think()
        reward: float = await good(task, base_url, api_key)
        return reward

    with caplog.at_level(logging.WARNING), AgentCollector(gateway, agent, ["a"], group_size=2) as collector:
        (batch,) = collector
    assert batch.shape == (2,)
    (warning,) = [each.getMessage() for each in caplog.records if "event loop has been blocked" in each.getMessage()]
    assert f"in {__file__}, line" in warning
    assert "think)" in warning
    assert "AsyncOpenAI" in warning


def test_an_agent_ends_its_clean_up_also_if_its_group_is_given_up_meanwhile(gateway: AgentGateway) -> None:
    cleaned: list[float] = []
    pauses = iter([0.0, 1.0, 1.0, 1.0])  # the first one's failure gives up the others in the middle of theirs

    async def agent(task: Any, base_url: str, api_key: str) -> float:
        try:
            await asyncio.Event().wait()
        finally:
            pause_s = next(pauses)
            await asyncio.sleep(pause_s)
            cleaned.append(pause_s)
        raise AssertionError

    with (
        AgentCollector(gateway, agent, ["a"], group_size=4, timeout_s=0.3) as collector,
        pytest.raises(AgentsFailedError, match="timeout_s=0.3"),
    ):
        next(iter(collector))
    assert sorted(cleaned) == [0.0, 1.0, 1.0, 1.0]
    assert gateway.list_sessions() == []


def test_torchrls_hooks_are_called_for_each_batch(gateway: AgentGateway) -> None:
    events: list[Any] = []
    with AgentCollector(gateway, rising(), ["a", "b"], group_size=2, groups_per_batch=1) as collector:
        collector.pre_collect_hook = lambda: events.append("before")
        collector.set_post_collect_hook(lambda batch: events.append(batch["group_id"].tolist()))
        for batch in collector:
            events.append(("yielded", batch["group_id"].tolist()))
    assert events == ["before", [0, 0], ("yielded", [0, 0]), "before", [1, 1], ("yielded", [1, 1]), "before"]


def test_an_iterator_without_a_task_is_an_error_and_not_an_empty_loop(gateway: AgentGateway) -> None:
    tasks = iter(["a"])
    with AgentCollector(gateway, rising(), tasks, group_size=2) as collector:
        assert len(list(collector)) == 1
        assert list(collector) == []
    with (
        AgentCollector(gateway, rising(), tasks, group_size=2) as collector,
        pytest.raises(ConfigError, match="tasks gave nothing"),
    ):
        list(collector)
