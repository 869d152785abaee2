"""``AgentCollector`` before a fake server: what it yields, what it replaces, how it ends and resumes."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torchrl.collectors import BaseCollector
from torchrl.objectives.llm import MCAdvantage

from tests.agent_runs import ask, ask_async, says, two_turns
from tests.fake_sglang import FakeServer, FakeSettings, logprobs, signature
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import AgentCollector, AgentGateway, AgentsFailedError, ConfigError, group_advantages
from torchrl_sglang.agents.settings import SessionSettings


@pytest.fixture(scope="module")
def gateway(tiny_llama: Path) -> Iterator[AgentGateway]:
    settings = SessionSettings(overrides={"ignore_eos": True})  # each answer has as many tokens as were asked for
    with (
        FakeServer(FakeSettings(model_path=tiny_llama)) as server,
        AgentGateway(server.url, settings=settings) as gateway,
    ):
        yield gateway


@pytest.fixture(autouse=True)
def no_session_is_left(gateway: AgentGateway) -> Iterator[None]:
    yield
    assert gateway.list_sessions() == []


def rising(task: Any) -> Iterator[float]:
    """A reward per run: 0, 1, 2, ..."""
    return map(float, itertools.count())


def texts(values: Any) -> list[str]:
    return list(values)


# ------------------------------------------------------------------ what it yields


@pytest.mark.torchrl
def test_rows_hold_what_was_sent_and_sampled(gateway: AgentGateway, tiny_llama: Path) -> None:
    with AgentCollector(gateway, two_turns(rising), ["1 + 1", "2 + 2"], group_size=3, groups_per_batch=2) as collector:
        assert isinstance(collector, BaseCollector)
        (batch,) = collector
    assert batch.shape == (6,)
    assert batch["group_id"].tolist() == batch["position"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["member"].tolist() == [0, 1, 2, 0, 1, 2]
    assert texts(batch["query"]) == ["1 + 1"] * 3 + ["2 + 2"] * 3
    assert batch["next", "reward"].shape == (6, 1, 1)
    assert sorted(batch["next", "reward"][:3].flatten().tolist()) == [0, 1, 2]
    assert batch["next", "done"].all()
    assert batch["next", "done"].shape == (6, 1)
    weights = signature(read_checkpoint(tiny_llama))
    for row in batch.unbind(0):
        full, mask = row["tokens", "full"], row["masks", "all_assistant_mask"]
        scores, prompt = row["log_probs", "full"], row["tokens", "prompt"]
        assert len(full) == len(mask) == len(scores)
        assert mask.sum() == 12, "two answers of six tokens"
        assert not mask[: len(prompt)].any()
        assert mask[len(prompt)]
        torch.testing.assert_close(torch.cat([prompt, row["tokens", "response"]]), full)
        expected = torch.tensor([math.nan, *logprobs(weights, full.tolist(), 320)[1:]])
        torch.testing.assert_close(scores[mask], expected[mask], atol=1e-5, rtol=0)
        assert scores[~mask].isnan().all()
        versions = row["generation", "weight_version"]
        assert (versions[mask[len(prompt) :]] == 0).all()
        assert (versions[~mask[len(prompt) :]] == -1).all()
        assert row["generation", "temperature"] == 1.0
        assert row["generation", "truncated"]
        said = json.loads(row["messages"])
        assert [message["role"] for message in said] == ["user", "assistant", "user", "assistant"]
        assert said[0]["content"] in row["text", "prompt"]
        assert said[2]["content"] in row["text", "response"]


def test_each_leaf_is_a_row_with_the_sessions_reward_and_counts_shared_tokens_once(gateway: AgentGateway) -> None:
    async def agent(task: str, base_url: str, api_key: str) -> float:
        first = await ask_async(base_url, api_key, [says(task)])
        start = [says(task), says(first[0], "assistant")]
        await ask_async(base_url, api_key, [*start, says("left")])
        await ask_async(base_url, api_key, [*start, says("right")], n=2)
        return next(rewards)

    rewards = iter([1.0, 3.0])
    with AgentCollector(gateway, agent, ["a"], group_size=2) as collector:
        (batch,) = collector
        assert collector.stats()["frames"] == 6
    assert batch["member"].tolist() == [0, 0, 0, 1, 1, 1]
    assert len(set(batch["next", "reward"][:3].flatten().tolist())) == 1
    sampled = [int(mask.sum()) for mask in batch.get(("masks", "all_assistant_mask"), as_list=True)]
    assert sorted(sampled[:3]) == [6, 6, 12], "the first answer counts in one of the three rows"
    advantages = group_advantages(batch)["advantage"]
    assert advantages.shape == (6, 1, 1)
    assert sorted(set(advantages.flatten().tolist())) == pytest.approx([-(2**-0.5), 2**-0.5])


@pytest.mark.torchrl
def test_advantages_agree_with_torchrls_where_each_run_is_one_trajectory(gateway: AgentGateway) -> None:
    with AgentCollector(gateway, two_turns(rising), ["a", "b"], group_size=3, groups_per_batch=2) as collector:
        (batch,) = collector
    expected = MCAdvantage(3).inv(batch.clone())["advantage"]
    torch.testing.assert_close(group_advantages(batch)["advantage"], expected, atol=1e-4, rtol=1e-4)


def test_what_the_agent_posts_with_its_reward_is_in_the_batch(gateway: AgentGateway) -> None:
    def agent(task: Any, base_url: str, api_key: str) -> None:
        ask(base_url, api_key, [says("hi")])
        reward = next(rewards)
        body = {"reward": reward, "info": {"right": reward > 0, "note": "by HTTP"}}
        url = base_url.removesuffix("/v1") + "/reward"
        httpx.post(url, json=body, headers={"Authorization": f"Bearer {api_key}"}).raise_for_status()

    rewards = iter([0.0, 1.0])
    with AgentCollector(gateway, agent, [{"q": 1, "position": 17}], group_size=2) as collector:
        (batch,) = collector
    assert batch["next", "right"].flatten().tolist() == (batch["next", "reward"].flatten() > 0).tolist()
    assert {info["note"] for info in batch["info"]} == {"by HTTP"}
    assert batch["position"].tolist() == [17, 17]
    assert batch["group_id"].tolist() == [0, 0]


# ------------------------------------------------------------------ what it replaces


def raises(task: Any, base_url: str, api_key: str) -> float:
    ask(base_url, api_key, [says("hi")])
    raise ValueError("no such tool")


def exits(task: Any, base_url: str, api_key: str) -> float:
    raise SystemExit(3)


async def exits_async(task: Any, base_url: str, api_key: str) -> float:
    raise SystemExit(3)


def gives(reward: Any) -> Callable[..., Any]:
    def agent(task: Any, base_url: str, api_key: str) -> Any:
        ask(base_url, api_key, [says("hi")])
        return reward

    return agent


async def hangs(task: Any, base_url: str, api_key: str) -> float:
    await ask_async(base_url, api_key, [says("hi")])
    await asyncio.Event().wait()
    raise AssertionError


def sleeps(task: Any, base_url: str, api_key: str) -> float:
    time.sleep(3)
    return 1.0


def posts_another(task: Any, base_url: str, api_key: str) -> float:
    ask(base_url, api_key, [says("hi")])
    url = base_url.removesuffix("/v1") + "/reward"
    httpx.post(url, json={"reward": 0.25}, headers={"Authorization": f"Bearer {api_key}"}).raise_for_status()
    return 0.75


FAILING = [
    (raises, "error", "ValueError: no such tool (line"),
    (exits, "error", "SystemExit(3)"),
    (exits_async, "error", "SystemExit(3)"),
    (gives(None), "no reward", "ended without a reward"),
    (gives("0.5"), "bad reward", "got '0.5' (str)"),
    (gives(math.nan), "bad reward", "a finite number, got nan"),
    (gives({"score": 1}), "bad reward", "unknown fields ['score']"),
    (gives([1, 2]), "bad reward", "got [1, 2] (list). The agent must return a number"),
    (posts_another, "bad reward", "returned 0.75 after 0.25 was posted"),
    (lambda task, base_url, api_key: 1.0, "no requests", "got no answer through the gateway"),
    (hangs, "timeout", "timeout_s=2 s"),
    (sleeps, "timeout", "timeout_s=2 s"),
]


@pytest.mark.parametrize(
    ("agent", "kind", "message"), FAILING, ids=[f"{i} {case[1]}" for i, case in enumerate(FAILING)]
)
def test_a_run_that_fails_is_reported_and_its_group_replaced(
    gateway: AgentGateway, agent: Any, kind: str, message: str
) -> None:
    good = two_turns(rising)

    async def sometimes(task: Any, base_url: str, api_key: str) -> Any:
        if task == "bad":
            tried = agent if asyncio.iscoroutinefunction(agent) else (lambda *given: asyncio.to_thread(agent, *given))
            return await tried(task, base_url, api_key)
        return await good(task, base_url, api_key)

    # asyncio.to_thread passes SystemExit on to the event loop, so that case runs as a plain function
    run_agent = (lambda *given: agent(*given) if given[0] == "bad" else good(*given)) if agent is exits else sometimes
    timeout_s = 2.0 if kind == "timeout" else 60.0
    with AgentCollector(gateway, run_agent, ["bad", "good"], group_size=2, timeout_s=timeout_s) as collector:
        (batch,) = collector
        stats, failures = collector.stats(), collector.failures
    assert texts(batch["query"]) == ["good", "good"]
    assert stats["skipped_groups"] == stats["skipped_failed"] == 1
    assert stats[f"failed_runs_{kind.replace(' ', '_')}"] == stats["failed_runs"] >= 1
    assert failures[0].kind == kind
    assert message in failures[0].message
    assert (failures[0].group_id, failures[0].session[:4]) == (0, "ses_")


def test_the_key_of_a_session_is_in_no_failure(gateway: AgentGateway) -> None:
    def agent(task: Any, base_url: str, api_key: str) -> float:
        raise ValueError(f"can't log in with {api_key}")

    with AgentCollector(gateway, agent, ["a"], group_size=2) as collector, pytest.raises(AgentsFailedError) as error:
        list(collector)
    assert "can't log in with ***" in str(error.value)
    assert all("sk-" not in str(each) for each in (error.value, *error.value.failures, *collector.failures))


def test_groups_with_equal_rewards_are_replaced_by_the_next_task(gateway: AgentGateway) -> None:
    def rewards(task: Any) -> Iterator[float]:
        return itertools.repeat(0.1 + 0.6) if task == 1 else rising(task)

    agent = two_turns(rewards)
    with AgentCollector(gateway, agent, range(5), group_size=2, groups_per_batch=2) as collector:
        batches = list(collector)
        stats = collector.stats()
    assert [sorted(set(batch["group_id"].tolist())) for batch in batches] == [[0, 2], [3, 4]]
    assert (stats["skipped_equal"], stats["groups"], stats["runs"]) == (1, 4, 10)

    agent = two_turns(rewards)
    with AgentCollector(gateway, agent, range(2), group_size=2, groups_per_batch=2, skip_equal=False) as collector:
        (batch,) = collector
    assert batch["group_id"].tolist() == [0, 0, 1, 1]
    assert group_advantages(batch)["advantage"][2:].abs().max() == 0


def test_a_failed_run_is_run_again_where_that_is_asked_for(gateway: AgentGateway) -> None:
    tried = itertools.count()

    def agent(task: Any, base_url: str, api_key: str) -> float:
        if next(tried) == 0:
            raise ConnectionError("for the moment")
        ask(base_url, api_key, [says("hi")])
        return float(next(tried))

    with AgentCollector(gateway, agent, ["a"], group_size=2, retries=1) as collector:
        (batch,) = collector
        stats = collector.stats()
    assert len(batch) == 2
    assert (stats["failed_runs"], stats["runs"], stats["skipped_groups"]) == (1, 3, 0)


@pytest.mark.parametrize(
    ("agent", "found", "advice"),
    [
        (raises, "(3 failed)", "Correct the agent"),
        (gives(1.0), "(5 had equal rewards)", "temperature=0"),
    ],
)
def test_collecting_ends_when_no_group_is_good(gateway: AgentGateway, agent: Any, found: str, advice: str) -> None:
    limits = {"max_failures": 3, "max_skips": 5, "groups_per_batch": 1}
    with AgentCollector(gateway, agent, itertools.count(), group_size=2, **limits) as collector:
        with pytest.raises(AgentsFailedError, match="one after the other gave nothing to train on") as error:
            next(iter(collector))
        assert found in str(error.value)
        assert advice in str(error.value)
        with pytest.raises(AgentsFailedError):
            next(iter(collector))


def test_tasks_that_end_without_a_good_group_are_an_error_and_not_an_empty_iteration(gateway: AgentGateway) -> None:
    with (
        AgentCollector(gateway, raises, ["a", "b"], group_size=2) as collector,
        pytest.raises(AgentsFailedError, match="all 2 tasks were tried, and none gave"),
    ):
        list(collector)


# ------------------------------------------------------------------ when it runs, and where it goes on


def test_the_last_batch_may_be_smaller_and_total_frames_ends_earlier(gateway: AgentGateway) -> None:
    with AgentCollector(gateway, two_turns(rising), range(3), group_size=2, groups_per_batch=2) as collector:
        assert [len(batch) for batch in collector] == [4, 2]
        assert list(collector) == []
    with AgentCollector(
        gateway, two_turns(rising), range(9), group_size=2, groups_per_batch=1, epochs=None, total_frames=6
    ) as collector:
        assert sum(len(batch) for batch in collector) == 6
        assert collector.stats()["completed"]
        assert len(collector) == 3


def test_without_ahead_nothing_runs_while_the_trainer_trains(gateway: AgentGateway) -> None:
    started: list[int] = []

    def counted(task: int) -> Iterator[float]:
        started.append(task)
        yield from rising(task)

    with AgentCollector(gateway, two_turns(counted), range(9), group_size=2, groups_per_batch=2) as collector:
        batches = iter(collector)
        next(batches)
        time.sleep(0.2)
        assert set(started) == {0, 1}
        next(batches)
        assert set(started) == {0, 1, 2, 3}


def test_with_ahead_collecting_continues_up_to_its_bound(gateway: AgentGateway) -> None:
    started: list[int] = []

    def counted(task: int) -> Iterator[float]:
        started.append(task)
        yield from rising(task)

    with AgentCollector(gateway, two_turns(counted), range(40), group_size=2, groups_per_batch=2, ahead=2) as collector:
        batch = next(iter(collector))
        deadline = time.monotonic() + 30
        while len(set(started)) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert sorted(set(started)) == list(range(6)), "one batch taken, two ahead"
        assert sorted(set(batch["group_id"].tolist())) == [0, 1]
        assert collector.state_dict()["tasks"] == {
            "next": 6,
            "again": [2, 3, 4, 5],
            "seed": None,
            "length": 40,
        }


@pytest.mark.torchrl
def test_a_resumed_collector_runs_what_was_not_yielded(gateway: AgentGateway) -> None:
    options: dict[str, Any] = {"group_size": 2, "groups_per_batch": 1}
    tasks = list("abcdefgh")
    with AgentCollector(gateway, two_turns(rising), tasks, **options) as straight:
        straight.set_seed(3)
        order = ["".join(set(batch["query"])) for batch in straight]
    assert sorted(order) == tasks
    assert order != tasks

    with AgentCollector(gateway, two_turns(rising), tasks, ahead=3, **options) as first:
        assert first.set_seed(3) == 4
        batches = iter(first)
        seen = ["".join(set(next(batches)["query"])) for _ in range(3)]
        state = json.loads(json.dumps(first.state_dict()))
    with AgentCollector(gateway, two_turns(rising), tasks, **options) as second:
        second.load_state_dict(state)
        assert second.stats()["frames"] == 6
        seen += ["".join(set(batch["query"])) for batch in second]
        with pytest.raises(ConfigError, match="before the first batch"):
            second.load_state_dict(state)
    assert seen == order
    with (
        AgentCollector(gateway, two_turns(rising), tasks, **options) as other,
        pytest.raises(ConfigError, match="no st"),
    ):
        other.load_state_dict({"frames": 1})


def test_no_more_runs_than_allowed_are_under_way_at_a_time(gateway: AgentGateway) -> None:
    under_way, most = set(), []

    async def agent(task: Any, base_url: str, api_key: str) -> float:
        under_way.add(base_url)
        most.append(len(under_way))
        await ask_async(base_url, api_key, [says("hi")])
        under_way.discard(base_url)
        return float(len(most))

    with AgentCollector(gateway, agent, range(3), group_size=4, groups_per_batch=3, concurrency=2) as collector:
        list(collector)
    assert max(most) == 2


def test_a_gateway_with_fewer_sessions_than_runs_makes_runs_wait(tiny_llama: Path) -> None:
    with (
        FakeServer(FakeSettings(model_path=tiny_llama)) as server,
        AgentGateway(server.url, settings=SessionSettings(max_sessions=3)) as small,
        AgentCollector(small, two_turns(rising), ["a"], group_size=4) as collector,
    ):
        (batch,) = collector
        assert len(batch) == 4
        assert collector.stats()["failed_runs"] == 0


def test_settings_that_an_agent_has_built_in_can_be_replaced(tiny_llama: Path) -> None:
    def agent(task: Any, base_url: str, api_key: str) -> float:
        ask(base_url, api_key, [says("hi")], temperature=0, top_p=0.5)
        return float(next(numbers))

    numbers = itertools.count()
    for overrides in ({}, {"temperature": 0.7, "top_p": 1.0}):
        with (
            FakeServer(FakeSettings(model_path=tiny_llama)) as server,
            AgentGateway(server.url, settings=SessionSettings(overrides=overrides)) as other,
            AgentCollector(other, agent, ["a"], group_size=2) as collector,
        ):
            (batch,) = collector
        assert batch["generation", "temperature"].tolist() == pytest.approx([overrides.get("temperature", 0.0)] * 2)
        assert batch["generation", "exact_log_probs"].all()
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server, pytest.raises(ConfigError, match="temperature"):
        AgentGateway(server.url, settings=SessionSettings(overrides={"temperature": -1}))


# ------------------------------------------------------------------ how it ends


def test_shutdown_ends_runs_and_whoever_waits_for_a_batch(gateway: AgentGateway) -> None:
    started = threading.Event()

    async def agent(task: Any, base_url: str, api_key: str) -> float:
        started.set()
        return await hangs(task, base_url, api_key)

    collector = AgentCollector(gateway, agent, range(9), group_size=2)
    raised: list[BaseException] = []

    def wait_for_batch() -> None:
        try:
            next(iter(collector))
        except ConfigError as error:
            raised.append(error)

    waiting = threading.Thread(target=wait_for_batch)
    waiting.start()
    assert started.wait(30)
    collector.shutdown()
    waiting.join(30)
    assert not waiting.is_alive()
    assert "shut down" in str(raised[0])
    collector.shutdown()
    with pytest.raises(ConfigError, match="was shut down"):
        next(iter(collector))


def test_leaving_a_loop_and_iterating_again_goes_on(gateway: AgentGateway) -> None:
    with AgentCollector(gateway, two_turns(rising), range(3), group_size=2, groups_per_batch=1) as collector:
        for batch in collector:
            assert set(batch["group_id"].tolist()) == {0}
            break
        assert [batch["group_id"][0].item() for batch in collector] == [1, 2]


# ------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run_agent": 5}, "run_agent must be a function"),
        ({"run_agent": lambda task: 1.0}, r"called as run_agent\(task, base_url, api_key\), and takes \(task\)"),
        ({"run_agent": "no_such_program_here {task}"}, "there is no program 'no_such_program_here'"),
        ({"run_agent": "echo 'open"}, "can't be split into arguments"),
        ({"run_agent": []}, "run_agent must be a function or a command line"),
        ({"run_agent": "echo {prompt}"}, "what is replaced are {base_url}, {api_key} and {task}"),
        ({"tasks": "abc"}, "tasks must be an iterable of tasks"),
        ({"tasks": {"a": 1}}, "whose items are columns, no tasks"),
        ({"tasks": 5}, "tasks must be an iterable of tasks"),
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": iter("ab"), "epochs": 2}, "can be iterated once"),
        ({"group_size": 1}, "skip_equal=False"),
        ({"group_size": 0}, "group_size must be"),
        ({"concurrency": 0}, "concurrency must be"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"ahead": -1}, "ahead must be"),
        ({"gateway": "http://127.0.0.1:1"}, "must be a running AgentGateway or a RemoteGateway, got str"),
    ],
)
def test_bad_arguments_are_refused(gateway: AgentGateway, given: dict[str, Any], message: str) -> None:
    arguments = {"gateway": gateway, "run_agent": raises, "tasks": ["a"], **given}
    with pytest.raises(ConfigError, match=message):
        AgentCollector(**arguments)


@pytest.mark.torchrl
def test_weights_need_a_scheme(gateway: AgentGateway) -> None:
    with (
        AgentCollector(gateway, raises, ["a"]) as collector,
        pytest.raises(ConfigError, match="no weight_sync_schemes"),
    ):
        collector.update_policy_weights_({})
