"""Pools, engines and policies that are pickled or copied while servers join, leave, die and come back."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Tokens

from tests.fake_sglang import FakeServer, Fault
from tests.fake_sglang.model import read_checkpoint
from tests.quick.pools import PROMPTS, SHORT, pool_of, servers_of
from torchrl_sglang import AsyncSGLang, SamplingParams, ServerUnreachableError, SGLangWrapper, SyncConfig, WeightSync
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool, dead_servers

Make = Callable[..., FakeServer]
LONG = SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)


def copied(pool: Any) -> Any:
    return pickle.loads(pickle.dumps(pool))


def test_a_copy_made_while_a_server_joins_does_not_use_it_before_it_has_the_weights(
    make: Make, tiny_llama: Path
) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    with closing(WeightSync(pool, SyncConfig(verify="off", transport="http"))) as sync:
        sync.push({name: tensor + 1 for name, tensor in read_checkpoint(tiny_llama).items()})
        second.arm(Fault(path="/begin_weight_update", action="slow", seconds=3))
        joining = Task(lambda: pool.add(second.url), name="add")
        while not any(event["path"] == "/begin_weight_update" for event in second.events):
            threading.Event().wait(0.01)
        copy = copied(pool)
        assert servers_of(copy) == {first.url}
        assert joining.wait(60)
        joining.outcome().unwrap()
        servers_of(copy)  # looks for newcomers
        for thread in threading.enumerate():
            if thread.name == "sglang-new-servers":
                thread.join(60)
        assert servers_of(copy) == {first.url, second.url}


def test_a_copy_made_while_a_server_leaves_does_not_use_it(make: Make) -> None:
    first, second = make(), make(step_s=0.02)
    pool = pool_of(first, second)
    long = Task(lambda: list(SGLangPool(pool.clients[1:]).stream([1, 2, 3], LONG)), name="long")
    while not any(event["path"] == "/generate" for event in second.events):
        threading.Event().wait(0.01)
    leaving = Task(lambda: pool.remove(second.url), name="remove")
    while not pool.state.has_left(second.url):
        threading.Event().wait(0.01)
    copy = copied(pool)
    assert [client.url for client in copy.clients] == [first.url]
    assert servers_of(copy) == {first.url}
    assert leaving.wait(60)
    assert long.wait(60)


def test_a_copy_that_connects_while_a_server_is_down_generates_on_the_others(
    make: Make, replace: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_servers, "_POLL_INTERVAL_S", 0.1)
    first, second = make(), make()
    engine = AsyncSGLang.connect([first.url, second.url])
    data = pickle.dumps(engine)
    first.stop()
    with pytest.raises(ServerUnreachableError):
        pool_of(first, second)  # the original, where it may be a wrong address
    copy = pickle.loads(data)
    assert servers_of(copy.pool) == {second.url}
    assert "when this copy of the pool connected" in copy.pool.quarantined[first.url]
    policy = copied(SGLangWrapper(copy, input_mode="tokens", generate_kwargs={"max_new_tokens": 3, "ignore_eos": True}))
    out = policy(lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(prompt))) for prompt in PROMPTS]))
    assert len(out) == len(PROMPTS)
    replace(first)
    for _ in range(600):
        if len(servers_of(copy.pool)) == 2:
            break
        threading.Event().wait(0.1)
    assert servers_of(copy.pool) == {first.url, second.url}
    second.stop()


def test_a_copy_none_of_whose_servers_answers_says_so(make: Make) -> None:
    server = make()
    data = pickle.dumps(pool_of(server))
    server.stop()
    with pytest.raises(ServerUnreachableError, match="nothing accepts connections"):
        pickle.loads(data).connect()


@pytest.mark.parametrize("is_copy", [False, True])
def test_a_server_that_leaves_and_joins_again_during_a_batch_leaves_no_prompt_half_answered(
    make: Make, is_copy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_servers, "_POLL_INTERVAL_S", 0.1)
    first, second = make(step_s=0.05), make(step_s=0.05)
    pool = pool_of(first, second)
    generating = copied(pool) if is_copy else pool
    generating.generate(PROMPTS, SHORT)
    batch = Task(lambda: generating.generate(PROMPTS, LONG), name="batch")
    while sum(event["path"] == "/generate" for event in second.events) < 2:
        threading.Event().wait(0.01)
    pool.remove(second.url, drain=False)
    pool.add(second.url)
    replies = batch.outcome().unwrap()
    assert [len(reply.output_ids) for reply in replies] == [LONG.max_new_tokens] * len(PROMPTS)
    for _ in range(600):
        if len(servers_of(generating)) == 2:  # a copy looks at it first, as at a new process
            break
        threading.Event().wait(0.1)
    assert servers_of(generating) == {first.url, second.url}


def test_a_server_that_is_added_again_is_not_aborted_by_its_removal(make: Make) -> None:
    first, second = make(), make()
    pool = pool_of(first, second)
    second.arm(Fault(path="/abort_request", action="slow", seconds=1))
    pool.remove(second.url, drain=False)
    pool.add(second.url)
    replies = list(SGLangPool(pool.clients[1:]).stream([1, 2, 3], LONG))
    assert len(replies[-1].output_ids) == LONG.max_new_tokens
    assert any(event["path"] == "/abort_request" for event in second.events)


def test_copies_made_at_any_moment_of_many_changes_answer_every_prompt(make: Make, tiny_llama: Path) -> None:
    first, others = make(), [make() for _ in range(3)]
    pool = pool_of(first)
    trained = {name: tensor + 1 for name, tensor in read_checkpoint(tiny_llama).items()}
    with closing(WeightSync(pool, SyncConfig(verify="off", transport="http"))) as sync:
        sync.push(trained)
        expected = [(reply.output_ids, reply.weight_version) for reply in pool.generate(PROMPTS, SHORT)]
        done = threading.Event()

        def change() -> None:
            for _ in range(4):
                for other in others:
                    pool.add(other.url)
                for other in others:
                    pool.remove(other.url, drain=False)

        changing = Task(change, name="change", on_done=lambda _: done.set())
        count = 0
        while not done.is_set() or count == 0:
            copy = copied(pool)
            for _ in range(2):
                assert [(reply.output_ids, reply.weight_version) for reply in copy.generate(PROMPTS, SHORT)] == expected
            copy.close()
            count += 1
        changing.outcome().unwrap()
