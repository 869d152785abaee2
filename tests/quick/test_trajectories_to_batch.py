"""Trajectories of sessions that someone else has run, as JSON, become the batch that a collector yields."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.agent_runs import ask, ask_async, says
from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import (
    AgentCollector,
    AgentGateway,
    ConfigError,
    Trajectory,
    group_advantages,
    recipes,
    trajectories_to_batch,
)
from torchrl_sglang.agents.collector.rewards import Reward
from torchrl_sglang.agents.collector.rows import Group, make_batch, make_run


@pytest.fixture(scope="module")
def gateway(tiny_llama: Path) -> Iterator[AgentGateway]:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server, AgentGateway(server.url) as gateway:
        yield gateway


def finished(gateway: AgentGateway, task: str, reward: float | None, *, branches: bool = False, **tags: Any) -> Any:
    """What a session of a harness has recorded, as JSON."""
    session = gateway.create_session(tags={"task": task, **tags})
    first = ask(session.base_url, session.api_key, [says(task)], ignore_eos=True)
    start = [says(task), says(first[0], "assistant")]
    ask(session.base_url, session.api_key, [*start, says("left")])
    if branches:
        ask(session.base_url, session.api_key, [*start, says("right")])
    if reward is not None:
        gateway.reward(session.id, reward, {"right": reward > 0})
    leaves = [leaf.as_json() for leaf in gateway.trajectories(session.id)]
    gateway.delete(session.id)
    return json.loads(json.dumps(leaves))


def test_a_batch_of_json_is_that_of_a_collector(gateway: AgentGateway, tokenizer: Any) -> None:
    kept: list[Trajectory] = []
    rewards = iter([1.0, 0.0, 0.5, 0.25])

    async def agent(task: Any, base_url: str, api_key: str) -> float:
        said = await ask_async(base_url, api_key, [says(task)])
        await ask_async(base_url, api_key, [says(task), says(said[0], "assistant"), says("Sure?")])
        return next(rewards)

    def keep(leaf: Trajectory) -> float:
        kept.append(leaf)
        assert leaf.reward is not None
        return leaf.reward

    with AgentCollector(
        gateway, agent, ["a", "b"], group_size=2, groups_per_batch=2, concurrency=1, row_reward=keep
    ) as collector:
        (collected,) = collector
    read = [json.loads(json.dumps(leaf.as_json())) for leaf in kept]
    for each in read:
        each["tags"]["task"] = "ab"[each["tags"]["group_id"]]
    made = trajectories_to_batch(read, tokenizer=tokenizer)
    assert set(made.keys(True, True)) == set(collected.keys(True, True))
    for key in ("group_id", "position", "member", "session", "query", "messages", "info", ("next", "reward")):
        values = [list(batch[key]) for batch in (made, collected)]
        assert values[0] == values[1], key
    for row, wanted in zip(made.unbind(0), collected.unbind(0), strict=True):
        for key in (("tokens", "full"), ("log_probs", "full"), ("masks", "all_assistant_mask"), "turn"):
            torch.testing.assert_close(row[key], wanted[key], equal_nan=True)
        assert row["text", "full"] == wanted["text", "full"]


def test_groups_are_those_of_a_tag_and_advantages_count_runs(gateway: AgentGateway, tokenizer: Any) -> None:
    leaves = [
        *finished(gateway, "2 + 2", 1.0, group_id=7, position=31),
        *finished(gateway, "3 + 3", 0.0, group_id=9),
        *finished(gateway, "2 + 2", 0.0, branches=True, group_id=7, position=31),
        *finished(gateway, "3 + 3", 0.0, group_id=9),
    ]
    batch = group_advantages(trajectories_to_batch(leaves, tokenizer=tokenizer))
    assert batch["group_id"].tolist() == [7, 7, 7, 9, 9]
    assert batch["position"].tolist() == [31, 31, 31, 9, 9]
    assert batch["member"].tolist() == [0, 1, 1, 0, 1]
    assert list(batch["query"]) == ["2 + 2"] * 3 + ["3 + 3"] * 2
    assert batch["next", "right"].flatten().tolist() == [True, False, False, False, False]
    half = 2**-0.5
    assert batch["advantage"].flatten().tolist() == pytest.approx([half, -half, -half, 0, 0])
    turns = [sorted(set(row["turn"].tolist()) - {-1}) for row in batch.unbind(0)]
    assert turns == [[0, 1], [0, 1], [1], [0, 1], [0, 1]], "the branch trains on its second answer alone"
    assert recipes.Conversations.from_trajectories(batch).turns_B.tolist() == [2, 2, 1, 2, 2]


def test_a_groups_number_that_a_tensor_can_not_hold_is_a_name(gateway: AgentGateway, tokenizer: Any) -> None:
    leaves = [*finished(gateway, "x", 1.0, group_id=2**64 - 1), *finished(gateway, "y", 0.0, group_id=5)]
    assert trajectories_to_batch(leaves, tokenizer=tokenizer)["group_id"].tolist() == [0, 1]


def test_groups_may_have_names_or_come_from_a_function(gateway: AgentGateway, tokenizer: Any) -> None:
    leaves = [*finished(gateway, "x", 1.0, problem="p-1"), *finished(gateway, "y", 0.0, problem="p-2")]
    assert trajectories_to_batch(leaves, tokenizer=tokenizer, group_by="problem")["group_id"].tolist() == [0, 1]
    by_length = trajectories_to_batch(leaves, tokenizer=tokenizer, group_by=lambda leaf: len(leaf.tags["task"]))
    assert by_length["group_id"].tolist() == [1, 1]


REFUSED: list[tuple[Callable[[list[Trajectory]], Any], str]] = [
    (lambda leaves: [], "there is no trajectory"),
    (lambda leaves: [replace(leaf, reward=None) for leaf in leaves], "has no reward yet"),
    (lambda leaves: [replace(leaf, status="expired", reward=None) for leaf in leaves], "expired, since its agent was"),
    (lambda leaves: leaves[1:], "is not there as a whole"),
    (lambda leaves: leaves[::-1], "is not there as a whole"),
    (lambda leaves: [replace(leaves[0], loss_mask=(0,) * len(leaves[0].loss_mask))], "has sampled nothing"),
    (lambda leaves: [replace(leaf, tags={}) for leaf in leaves], "has no tag 'group_id'"),
    (lambda leaves: [replace(leaf, tags={"group_id": [1]}) for leaf in leaves], "has a list or an object as its tag"),
    (lambda leaves: [{"token_ids": [1]}], "no trajectory of this version"),
    (lambda leaves: [{**leaves[0].as_json(), "loss_mask": [1]}], "have different lengths"),
    (lambda leaves: [{**leaves[0].as_json(), "colour": "red"}], "colour"),
    (lambda leaves: ["text"], "no trajectory of this version"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_must_not_be_trained_on_is_refused(
    gateway: AgentGateway, tokenizer: Any, change: Callable[[list[Trajectory]], Any], message: str
) -> None:
    leaves = [Trajectory.from_json(leaf) for leaf in finished(gateway, "x", 1.0, branches=True, group_id=1)]
    with pytest.raises(ConfigError) as caught:
        trajectories_to_batch(change(leaves), tokenizer=tokenizer)
    assert message in str(caught.value)


# ------------------------------------------------------------------ rewards of rows, and roles


async def solves_and_checks(task: Any, base_url: str, api_key: str) -> Any:
    """Two conversations of one run: a solver with as many drafts as the task says, and a checker."""
    for draft in range(task["drafts"].pop(0)):
        await ask_async(base_url, api_key, [says("You solve.", "system"), says(f"draft {draft}")])
    await ask_async(base_url, api_key, [says("You check.", "system"), says("right?")])
    solved, checked = task["rewards"].pop(0)
    return {"reward": solved, "info": {"checker": checked}}


def role_of(leaf: Trajectory) -> str:
    return "checker" if "check" in leaf.messages[0]["content"] else "solver"


def reward_of(leaf: Trajectory) -> float:
    return float(leaf.info["checker"]) if role_of(leaf) == "checker" else float(leaf.reward or 0)


class Task(dict[str, Any]):
    """One for all runs, unlike a plain dict."""


def test_rows_may_have_their_own_rewards_which_are_compared_within_a_role(gateway: AgentGateway) -> None:
    task = Task(drafts=[2, 1, 1], rewards=[(1.0, 5.0), (0.0, 5.0), (0.0, 8.0)])
    with AgentCollector(
        gateway, solves_and_checks, [task], group_size=3, concurrency=1, row_reward=reward_of, role=role_of
    ) as collector:
        (batch,) = collector
    assert list(batch["role"]) == ["solver", "solver", "checker", "solver", "checker", "solver", "checker"]
    assert batch["next", "reward"].flatten().tolist() == [1, 1, 5, 0, 5, 0, 8]
    advantage = group_advantages(batch, normalize=False)["advantage"].flatten()
    third = 1 / 3
    assert advantage.tolist() == pytest.approx([2 * third, 2 * third, -1, -third, -1, -third, 2])
    scaled = group_advantages(batch)["advantage"].flatten()
    solvers, checkers = torch.tensor([1.0, 0.0, 0.0]).std(), torch.tensor([5.0, 5.0, 8.0]).std()
    assert scaled.tolist() == pytest.approx(
        [
            *[float(2 * third / solvers)] * 2,
            float(-1 / checkers),
            float(-third / solvers),
            float(-1 / checkers),
            float(-third / solvers),
            float(2 / checkers),
        ]
    )


def test_a_group_whose_rows_differ_in_one_role_is_kept_and_one_whose_roles_are_equal_is_not(
    gateway: AgentGateway,
) -> None:
    equal = Task(drafts=[1, 1], rewards=[(1.0, 5.0), (1.0, 5.0)])
    differ = Task(drafts=[1, 1], rewards=[(1.0, 5.0), (1.0, 6.0)])
    with AgentCollector(
        gateway, solves_and_checks, [equal, differ], group_size=2, concurrency=1, row_reward=reward_of, role=role_of
    ) as collector:
        (batch,) = collector
        assert collector.stats()["skipped_equal"] == 1
    assert batch["group_id"].unique().tolist() == [1]


@pytest.mark.parametrize(
    "bad",
    [
        lambda leaf: float("nan"),
        lambda leaf: "high",
        lambda leaf: leaf.info["missing"],
        lambda leaf: next(turn for turn in leaf.messages if turn["role"] == "tool"),
    ],
)
def test_a_reward_function_that_fails_is_a_failed_run(gateway: AgentGateway, bad: Any) -> None:
    tasks = [Task(drafts=[1] * 2, rewards=[(1.0, 5.0)] * 2)]
    with AgentCollector(gateway, solves_and_checks, tasks, group_size=2, row_reward=bad) as collector:
        with pytest.raises(Exception, match="bad reward: row_reward or role failed"):
            next(iter(collector))
        assert collector.failures[0].kind == "bad reward"


def test_a_reward_function_that_does_not_return_is_a_failed_run(gateway: AgentGateway) -> None:
    never = threading.Event()
    tasks = [Task(drafts=[1] * 2, rewards=[(1.0, 5.0)] * 2)]
    with AgentCollector(
        gateway, solves_and_checks, tasks, group_size=2, timeout_s=3, row_reward=lambda leaf: never.wait()
    ) as collector:
        with pytest.raises(Exception, match="row_reward or role had not ended after timeout_s=3 s"):
            next(iter(collector))
        assert collector.failures[0].kind == "timeout"
    never.set()


@pytest.mark.parametrize(
    ("rewards", "are_equal"), [([1.0, 0.0, 2.0], True), ([1.0, 0.0, 3.0], False)], ids=["same", "differ"]
)
def test_groups_are_equal_where_all_advantages_are_0(tokenizer: Any, rewards: list[float], are_equal: bool) -> None:
    """The rows of a role that one run alone has are compared with none."""
    leaf = Trajectory(
        token_ids=(5, 6),
        loss_mask=(0, 1),
        log_probs=(0.0, -0.5),
        weight_versions=(-1, 3),
        temperatures=(0.0, 1.0),
        finish_reason="stop",
        messages=(),
        parent=None,
    )
    leaves = [replace(leaf, session=session) for session in ("a", "a", "a", "b")]
    given = dict(zip(map(id, leaves), [*rewards, 2.0], strict=True))
    role = {id(one): "judge" if index < 2 else "solver" for index, one in enumerate(leaves)}
    runs = [
        make_run(
            session,
            [one for one in leaves if one.session == session],
            Reward(value=0.0),
            row_reward=lambda one: given[id(one)],
            role=lambda one: role[id(one)],
        )
        for session in ("a", "b")
    ]
    group = Group(number=0, task="?", runs=runs)
    advantage = group_advantages(make_batch([group], decode=tokenizer.decode))["advantage"]
    assert group.has_equal_rewards() == are_equal == bool((advantage == 0).all())
