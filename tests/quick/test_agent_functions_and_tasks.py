"""What a user brings as ``run_agent`` and as tasks: forms of functions, and values of tasks."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from uuid import UUID

import httpx
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch.utils.data import DataLoader

from tests.agent_runs import ask, ask_async, says
from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import AgentCollector, AgentGateway, AgentsFailedError, ConfigError
from torchrl_sglang.agents.collector.rewards import last_line, read_last_line
from torchrl_sglang.agents.collector.runners import make_runner
from torchrl_sglang.agents.collector.task_stream import TaskStream
from torchrl_sglang.agents.collector.task_texts import own_copy, task_as_json, task_label


@pytest.fixture(scope="module")
def gateway(tiny_llama: Path) -> Iterator[AgentGateway]:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server, AgentGateway(server.url) as gateway:
        yield gateway


def collect(gateway: AgentGateway, run_agent: Any, tasks: Any = ("a",)) -> Any:
    with AgentCollector(gateway, run_agent, tasks, group_size=2, skip_equal=False) as collector:
        (batch,) = collector
        return batch


# ------------------------------------------------------------------ functions


def in_another_order(api_key: str, base_url: str, task: Any) -> float:
    ask(base_url, api_key, [says(task)])
    return 1.0


async def by_name(*, task: Any, base_url: str, api_key: str, judge: str = "none") -> float:
    await ask_async(base_url, api_key, [says(task)])
    return 1.0


async def further(judge: Any, task: Any, base_url: str, api_key: str) -> float:
    return await by_name(task=task, base_url=base_url, api_key=api_key)


def other_names(question: str, url: str, key: str) -> float:
    return in_another_order(key, url, question)


@pytest.mark.parametrize(
    "run_agent",
    [
        in_another_order,
        by_name,
        functools.partial(further, "judge"),
        functools.partial(by_name, judge="some"),
        other_names,
        lambda task, base_url, api_key: by_name(task=task, base_url=base_url, api_key=api_key),
    ],
    ids=["another order", "by name", "partial", "partial by name", "other names", "lambda of async"],
)
def test_arguments_reach_the_parameters_of_their_names(gateway: AgentGateway, run_agent: Any) -> None:
    assert list(collect(gateway, run_agent)["query"]) == ["a", "a"]


def yields(task: Any, base_url: str, api_key: str) -> Iterator[float]:
    yield 1.0


async def yields_async(task: Any, base_url: str, api_key: str) -> Any:
    yield 1.0


class Yields:
    def __call__(self, task: Any, base_url: str, api_key: str) -> Iterator[float]:
        yield 1.0


@pytest.mark.parametrize("run_agent", [yields, yields_async, Yields(), functools.partial(yields)])
def test_a_generator_is_refused_before_anything_runs(run_agent: Any) -> None:
    with pytest.raises(ConfigError, match="must return its reward"):
        make_runner(run_agent)


@pytest.mark.parametrize(
    ("run_agent", "message"),
    [
        (lambda task, base_url: 1.0, "takes (task, base_url)"),
        (lambda task, base_url, api_key, judge: 1.0, "missing a required argument: 'judge'"),
        (float, "takes"),
        (3, "got int"),
        (["agent", 3], "a function or a command line"),
        ("agent.sh | tail -1", "'|', and is started without a shell"),
        ("python3 agent.py {question}", "has {question}"),
        (Path("/no/such/program"), "there is no program '/no/such/program'"),
    ],
)
def test_what_can_not_be_run_is_refused_before_anything_runs(run_agent: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_runner(run_agent)
    assert message in str(caught.value)


class Several(Exception):
    """As an ``ExceptionGroup``, which Python 3.10 does not have."""

    def __init__(self, *exceptions: Exception) -> None:
        super().__init__(f"several ({len(exceptions)} sub-exceptions)")
        self.exceptions = exceptions


def test_the_error_of_a_task_group_is_that_of_its_first_task(gateway: AgentGateway) -> None:
    async def run_agent(task: Any, base_url: str, api_key: str) -> float:
        try:
            raise OSError("no route to the host")
        except OSError as error:
            raise Several(ConnectionError("Connection error.")) from error

    async def causes(task: Any, base_url: str, api_key: str) -> float:
        try:
            raise OSError("no route to the host")
        except OSError as error:
            raise ConnectionError("Connection error.") from error

    for agent, message in (
        (run_agent, "ConnectionError: Connection error."),
        (causes, "Connection error., caused by OSError: no route"),
    ):
        with AgentCollector(gateway, agent, ["a"], group_size=2, skip_equal=False) as collector:
            with pytest.raises(Exception, match="none gave a group"):
                next(iter(collector))
            assert message in collector.failures[0].message


# ------------------------------------------------------------------ tasks


def test_a_run_that_changes_its_task_changes_no_other_runs(gateway: AgentGateway) -> None:
    async def run_agent(task: Any, base_url: str, api_key: str) -> float:
        task["messages"].append("said")
        await ask_async(base_url, api_key, [says("hi")])
        return float(len(task["messages"]))

    tasks = [{"messages": [], "tool": object()}]
    batch = collect(gateway, run_agent, tasks)
    assert batch["next", "reward"].flatten().tolist() == [1, 1]
    assert tasks[0]["messages"] == []


def test_a_copy_shares_what_is_no_plain_container() -> None:
    tool = object()
    task = {"a": [{"b": (1, [2])}, {3}], "tool": tool}
    made = own_copy(task)
    assert made == task
    assert made["tool"] is tool
    assert made["a"] is not task["a"]
    assert made["a"][0]["b"][1] is not task["a"][0]["b"][1]  # type: ignore[index]


def test_a_copy_holds_itself_where_the_task_does() -> None:
    task: dict[str, Any] = {"steps": []}
    task["steps"].append((task, task["steps"]))
    made = own_copy(task)
    ((itself, steps),) = made["steps"]
    assert itself is made is not task
    assert steps is made["steps"] is not task["steps"]


@dataclass
class Sum:
    a: int
    b: int


class Pair(NamedTuple):
    a: int
    b: int


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("ü 'x'", "ü 'x'"),
        (np.int64(3), "3"),
        (torch.tensor([1, 2]), "[1, 2]"),
        ({"x": np.float32(0.5), "y": np.arange(2)}, '{"x": 0.5, "y": [0, 1]}'),
        (TensorDict({"x": torch.tensor(1)}), '{"x": 1}'),
        (Sum(1, 2), '{"a": 1, "b": 2}'),
        (Pair(1, 2), "[1, 2]"),
        ({"file": PurePath("a/b"), "id": UUID(int=1)}, '{"file": "a/b", "id": "00000000-0000-0000-0000-000000000001"}'),
        ({"s": {2, 1}}, '{"s": [1, 2]}'),
    ],
)
def test_a_task_is_written_as_plain_json(task: Any, text: str) -> None:
    assert task_as_json(task) == task_label(task) == text


@pytest.mark.parametrize("task", [object(), {"f": print}, {"x": float("nan")}, {(1, 2): 3}])
def test_what_json_has_not_is_no_text_for_a_program_and_any_label(task: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        task_as_json(task)
    assert task_label(task) == str(task)


class Frame:
    columns = ("a", "b")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (TensorDict({"x": torch.arange(3)}, [3]), "td.unbind(0)"),
        (Frame(), "df.to_dict('records')"),
        ({"train": [1]}, "whose items are columns"),
        (DataLoader([{"q": "a"}], batch_size=1), "batch_size=None"),
    ],
)
def test_columns_and_batches_are_no_tasks(tasks: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TaskStream(tasks)
    assert message in str(caught.value)


def test_a_loader_of_single_tasks_is_iterated_in_each_epoch() -> None:
    stream = TaskStream(DataLoader([{"q": "a"}, {"q": "b"}], batch_size=None), epochs=2)
    seen = []
    while (task := stream.take()) is not None:
        seen.append(task.task["q"])
    assert seen == ["a", "b", "a", "b"]


def test_the_position_of_a_task_may_be_numpys(gateway: AgentGateway) -> None:
    tasks: list[Any] = [{"position": np.int64(17)}, {"position": torch.tensor(5)}, {"position": "?"}]
    with AgentCollector(
        gateway,
        lambda task, base_url, api_key: in_another_order(api_key, base_url, "hi"),
        tasks,
        group_size=2,
        skip_equal=False,
    ) as collector:
        (batch,) = collector
    assert batch["position"].tolist() == [17, 17, 5, 5, 2, 2]


# ------------------------------------------------------------------ the last line

SHOWN: list[tuple[str, float | None]] = [
    ("\x1b[32m0.5\x1b[0m\n", 0.5),
    ("0.5\n\x1b[0m\n", 0.5),
    ("\x1b]0;title\x07answer\r\n\x1b[1;31m-1.5e-1\x1b[0m\r\n", -0.15),
    ("50 %\rdone\n1.\n", 1.0),
    ("1_000", None),
    ("١", None),
    ("reward: 1", None),
    ("0,5", None),
    ("", None),
]


@pytest.mark.parametrize(("output", "reward"), SHOWN)
def test_a_reward_is_read_as_a_terminal_shows_it(output: str, reward: float | None) -> None:
    found = read_last_line(output)
    assert (None if found is None else found.value) == reward


def test_the_last_line_is_the_last_that_shows_something() -> None:
    assert last_line("a\n\x1b[2K\n \t\n") == "a"


# ------------------------------------------------------------------ what the gateway said


def test_a_failed_run_says_what_the_gateway_answered_last(gateway: AgentGateway) -> None:
    """httpx, requests and fetch tell the status alone."""

    def too_long(task: Any, base_url: str, api_key: str) -> float:
        ask(base_url, api_key, [says("hi")])
        ask(base_url, api_key, [says("far too long " * 5000)])
        return 1.0

    def goes_on(task: Any, base_url: str, api_key: str) -> float:
        with pytest.raises(httpx.HTTPStatusError):
            ask(base_url, api_key, [says("far too long " * 5000)])
        ask(base_url, api_key, [says("hi")])
        raise ValueError("another reason")

    for agent, told in ((too_long, True), (goes_on, False)):
        with AgentCollector(gateway, agent, ["a"], group_size=2) as collector:
            with pytest.raises(AgentsFailedError):
                next(iter(collector))
            assert ("The gateway had told it: the conversation has" in collector.failures[0].message) == told


def test_a_client_that_gave_up_is_told_of_where_nothing_was_answered(make: Any) -> None:
    def hurries(task: Any, base_url: str, api_key: str) -> float:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(
                f"{base_url}/chat/completions",
                json={"model": "m", "messages": [says("hi")], "max_tokens": 200, "ignore_eos": True},
                headers={"Authorization": f"Bearer {api_key}"},
                timeout=0.3,
                verify=False,
            )
        while not told:
            time.sleep(0.01)
        return 1.0

    told: list[str] = []
    with AgentGateway(make(step_s=0.05).url) as slow, AgentCollector(slow, hurries, ["a"], group_size=2) as collector:

        def collect() -> None:
            with pytest.raises(AgentsFailedError):
                next(iter(collector))

        batches = threading.Thread(target=collect, daemon=True)
        batches.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(info.last_error for info in slow.list_sessions()):
            time.sleep(0.01)
        assert all("closed the connection" in info.last_error for info in slow.list_sessions() if info.last_error)
        told.append("")
        batches.join(60)
        assert "closed the connection before the answer was complete" in collector.failures[0].message


# ------------------------------------------------------------------ resuming


def test_a_state_goes_on_with_the_same_tasks_in_the_same_order_alone() -> None:
    first = TaskStream(list("abcd"))
    first.seed(3)
    for _ in range(2):
        task = first.take()
        assert task is not None
        first.done(task.number)
    state = first.state_dict()
    with pytest.raises(ConfigError, match="that of 4 tasks, and there are 3"):
        TaskStream(list("abc")).load_state_dict(state)
    second = TaskStream(list("abcd"))
    second.load_state_dict(state)
    second.seed(3)
    with pytest.raises(ConfigError, match="has seed 3. Leave set_seed out"):
        second.seed(4)
    rest = [second.take(), second.take()]
    assert [each.task for each in rest if each] == [each.task for each in (first.take(), first.take()) if each]
