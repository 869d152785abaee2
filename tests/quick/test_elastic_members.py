"""Servers that join and leave a pool while it generates: which weights they get; each prompt is answered once."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fake_sglang import FakeServer, FakeSettings, Fault, logprobs, signature
from tests.fake_sglang.model import read_checkpoint
from tests.quick.pools import PROMPTS, SHORT, pool_of
from torchrl_sglang import (
    ConfigError,
    SamplingParams,
    ServerError,
    ServerUnreachableError,
    SyncConfig,
    WeightSync,
    WeightUpdateError,
)
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import membership
from torchrl_sglang.protocol.messages import GenerateReply

LONG = SamplingParams(max_new_tokens=150, temperature=0, ignore_eos=True)
PLAIN = SyncConfig(verify="off")

Make = Callable[..., FakeServer]


@pytest.fixture
def tensors(tiny_llama: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(tiny_llama)


def paths(server: FakeServer) -> list[str]:
    return [event["path"] for event in server.events]


def holds(server: FakeServer, tensors: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(server.weights[0][name], tensor) for name, tensor in tensors.items())


def changed(tensors: dict[str, torch.Tensor], by: float) -> dict[str, torch.Tensor]:
    return {name: tensor + by for name, tensor in tensors.items()}


def assert_exact(prompt: list[int], reply: GenerateReply, weights: dict[str, torch.Tensor]) -> None:
    """The reply is the one of a model with these weights, and complete."""
    scores = logprobs(signature(weights), [*prompt, *reply.output_ids], 320)
    assert reply.output_logprobs == pytest.approx(scores[len(prompt) :], abs=1e-5)
    assert reply.finish_reason == "length"


# ------------------------------------------------------------------------------------------------ what a newcomer gets


def test_a_newcomer_with_the_same_weights_gets_requests_at_once(make: Make) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    assert pool.add(second.url) == (second.url,)
    assert {reply.server for reply in pool.generate(PROMPTS, SHORT)} == {first.url, second.url}
    assert "/pause_generation" not in paths(first) + paths(second)


@pytest.mark.parametrize("groups", ["shared", "per_server"])
def test_a_newcomer_gets_the_weights_of_the_last_push_and_only_it_is_paused(
    make: Make, tensors: dict[str, torch.Tensor], groups: Any
) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    sync = WeightSync(pool, SyncConfig(verify="off", groups=groups))
    sync.push(changed(tensors, 1.0))
    before = paths(first)
    pool.add(second.url)
    new = paths(first)[len(before) :]
    assert not {"/pause_generation", "/begin_weight_update", "/update_weights_from_distributed"} & set(new)
    assert holds(second, changed(tensors, 1.0))
    held = [client.weight_version() for client in pool.clients]
    assert held[0] == held[1] == f"1@{sync.owner}"
    assert pool.weight_version == 1
    assert {reply.server for reply in pool.generate(PROMPTS, SHORT)} == {first.url, second.url}
    report = sync.push(changed(tensors, 2.0))  # over a new group
    assert report is not None
    assert report.version == 2
    assert holds(first, changed(tensors, 2.0))
    assert holds(second, changed(tensors, 2.0))
    sync.close()


def test_after_the_trainer_has_changed_its_tensors_a_newcomer_waits_for_the_next_push(
    make: Make, tensors: dict[str, torch.Tensor]
) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    sync = WeightSync(pool, PLAIN)
    trained = changed(tensors, 1.0)
    sync.push(trained)
    for tensor in trained.values():
        tensor.add_(1)
    pool.add(second.url)
    assert list(pool.quarantined) == [second.url]
    assert "the next weight update brings them" in pool.quarantined[second.url]
    assert {reply.server for reply in pool.generate(PROMPTS, SHORT)} == {first.url}
    sync.push(trained)
    assert not pool.quarantined
    assert holds(second, trained)
    sync.close()


def test_a_change_that_autograd_does_not_see_is_found_by_comparing_with_the_other_servers(
    make: Make, tensors: dict[str, torch.Tensor]
) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    sync = WeightSync(pool, PLAIN)
    trained = changed(tensors, 1.0)
    sync.push(trained)
    next(iter(trained.values())).data.add_(1)
    pool.add(second.url)
    assert "has changed its tensors" in pool.quarantined[second.url]
    # It is marked, so that no other process uses it either.
    assert pool.clients[1].weight_version().startswith("dirty-")
    assert {reply.server for reply in pool.generate(PROMPTS, SHORT)} == {first.url}
    sync.push(trained)
    assert not pool.quarantined
    sync.close()


def test_weights_that_came_as_an_iterator_can_not_be_sent_again(make: Make, tensors: dict[str, torch.Tensor]) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    sync = WeightSync(pool, PLAIN)
    sync.push(iter(tensors.items()))
    pool.add(second.url)
    assert list(pool.quarantined) == [second.url]
    sync.push(iter(tensors.items()))
    assert not pool.quarantined
    sync.close()


def test_through_a_shared_folder_a_newcomer_gets_them_whatever_the_trainer_has_done_since(
    make: Make, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    sync = WeightSync(pool, SyncConfig(verify="off", transport="disk", disk_dir=tmp_path))
    trained = changed(tensors, 1.0)
    sync.push(trained)
    for tensor in trained.values():
        tensor.add_(1)
    pool.add(second.url)
    assert not pool.quarantined
    assert holds(second, changed(tensors, 1.0))
    assert pool.clients[1].weight_version() == f"1@{sync.owner}"
    sync.close()


def test_a_newcomer_waits_for_a_push_of_all_tensors_while_parts_are_sent_to_the_others(
    make: Make, tensors: dict[str, torch.Tensor]
) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    sync = WeightSync(pool, PLAIN)
    sync.push(iter(changed(tensors, 1.0).items()))
    pool.add(second.url)
    name = "lm_head.weight"
    sync.push({name: tensors[name] + 5}, partial=True)
    assert first.weights[0][name].equal(tensors[name] + 5)
    assert list(pool.quarantined) == [second.url]
    sync.push(changed(tensors, 2.0))
    assert not pool.quarantined
    sync.close()


def test_a_newcomer_gets_the_adapter_of_the_last_push(make: Make, tiny_llama: Path) -> None:
    first, second, third = make(enable_lora=True), make(enable_lora=True), make(enable_lora=True, weight_version="7@x")
    pool = pool_of(first)
    sync = WeightSync(pool, SyncConfig(verify="off", transport="lora"))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    sync.push(model)
    sync.push(model)
    before = pool.generate(PROMPTS, SHORT)
    pool.add(second.url)
    assert not pool.quarantined
    assert "/pause_generation" not in paths(first) + paths(second)
    replies = pool.generate(PROMPTS, SHORT)
    assert {reply.server for reply in replies} == {first.url, second.url}
    assert [reply.output_ids for reply in replies] == [reply.output_ids for reply in before]
    assert {reply.weight_version for reply in replies} == {f"2@{sync.owner}"}
    with pytest.raises(ConfigError, match="an adapter needs the same base model everywhere"):
        pool.add(third.url)
    # Requests that began before the last push may still use the adapter before it.
    earlier = f"torchrl-{sync.owner}-1"
    assert {reply.server for reply in pool.generate(PROMPTS, SHORT, lora=earlier)} == {first.url, second.url}
    pool.remove(second.url)
    pool.add(second.url)  # it has the adapters still
    assert not pool.quarantined
    sync.push(model)
    assert len(pool.generate(PROMPTS, SHORT)) == len(PROMPTS)
    pool.remove(second.url)
    first.arm(Fault(path="/load_lora_adapter_from_tensors", action="refuse"))
    with pytest.raises(WeightUpdateError):
        sync.push(model)
    pool.add(second.url)  # the last adapter that all have, not the one that was refused
    assert {reply.weight_version for reply in pool.generate(PROMPTS, SHORT)} == {f"3@{sync.owner}"}
    sync.close()


def test_the_salt_of_the_prefix_caches_stays_when_a_server_joins(make: Make, tensors: dict[str, torch.Tensor]) -> None:
    """Otherwise requests would find prefixes that the other servers computed with earlier weights."""
    first, second = make(), make()
    pool = pool_of(first)
    sync = WeightSync(pool, SyncConfig(verify="off", pause="in_place"))
    sync.push(changed(tensors, 1.0))
    salt = pool.state.weights.cache_salt
    assert salt is not None
    pool.add(second.url)
    assert pool.state.weights.cache_salt == salt
    assert pool.state.server(second.url).weights == "new"
    sync.close()


def test_a_newcomer_that_fails_in_its_update_is_no_member_and_the_others_go_on(
    make: Make, tensors: dict[str, torch.Tensor]
) -> None:
    first = make()
    second = make(faults=(Fault(path="/end_weight_update", action="refuse", message="no"),))
    pool = pool_of(first)
    sync = WeightSync(pool, PLAIN)
    sync.push(tensors)
    with pytest.raises(WeightUpdateError, match="no"):
        pool.add(second.url)
    assert [client.url for client in pool.clients] == [first.url]
    assert len(pool.generate(PROMPTS, SHORT)) == len(PROMPTS)
    sync.push(tensors)
    second.disarm()
    pool.add(second.url)  # our own update has left it behind: the next one heals it
    assert list(pool.quarantined) == [second.url]
    sync.push(tensors)
    assert not pool.quarantined
    sync.close()


def test_a_newcomer_waits_for_the_update_under_way(make: Make, tensors: dict[str, torch.Tensor]) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    sync = WeightSync(pool, PLAIN)
    first.arm(Fault(path="/end_weight_update", action="slow", seconds=0.5))
    pending = sync.push_in_background(changed(tensors, 1.0))
    pool.add(second.url)
    assert pending.done
    assert holds(second, changed(tensors, 1.0))
    assert not pool.quarantined
    sync.close()


def test_a_server_that_comes_back_to_its_old_place_is_a_new_process(
    make: Make, tensors: dict[str, torch.Tensor]
) -> None:
    first, second = make(), make()
    pool = pool_of(first, second)
    sync = WeightSync(pool, PLAIN)
    sync.push(changed(tensors, 1.0))
    pool.remove(second.url)
    sync.push(changed(tensors, 2.0))
    assert holds(second, changed(tensors, 1.0))
    pool.add(second.url)
    assert holds(second, changed(tensors, 2.0))
    assert pool.state.server(second.url).restarts == 1
    sync.push(changed(tensors, 3.0))
    assert holds(first, changed(tensors, 3.0))
    assert holds(second, changed(tensors, 3.0))
    pool.remove(second.url)
    pool.add(second.url)  # it has missed nothing: nothing is sent
    assert paths(second).count("/pause_generation") == 3
    sync.close()


def test_a_newcomer_of_a_pool_that_another_process_updates_is_used_once_it_has_been_updated(
    make: Make, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrl_sglang.pool.dead_servers._POLL_INTERVAL_S", 0.0)
    first, second = make(weight_version="4@abcd"), make(weight_version="9@other")
    pool = pool_of(first)
    pool.add(second.url)
    pool.generate(PROMPTS, SHORT)
    assert list(pool.quarantined) == [second.url], "a higher number of another trainer is not the current version"
    second.set_state(weight_version="4@abcd")
    deadline = time.monotonic() + 10
    while pool.quarantined and time.monotonic() < deadline:
        pool.generate(PROMPTS, SHORT)
    assert not pool.quarantined


# ------------------------------------------------------------------------------------------------------------- refused


def test_a_member_can_not_be_added_again_also_not_under_another_name(make: Make) -> None:
    first = make()
    pool = pool_of(first)
    with pytest.raises(ConfigError, match="is a server of this pool already"):
        pool.add(first.url)
    with pytest.raises(ConfigError, match=r"already, under the name http://127\.0\.0\.1"):
        pool.add(first.url.replace("127.0.0.1", "localhost"))
    second = make()
    with pytest.raises(ConfigError, match="is a server of this pool already"):
        pool.add([second.url, second.url])
    assert len(pool.clients) == 1


def test_a_server_that_does_not_fit_is_refused_and_the_pool_is_as_before(
    make: Make, make_model: Callable[..., Path]
) -> None:
    first = make()
    pool = pool_of(first)
    sync = WeightSync(pool, PLAIN)
    with (
        FakeServer(FakeSettings(model_path=make_model(arch="qwen2"))) as other,
        pytest.raises(ConfigError, match="one pool needs servers of one model"),
    ):
        pool.add(other.url)
    with pytest.raises(ConfigError, match="lora_enabled=True, and this pool's servers with False"):
        pool.add(make(enable_lora=True).url)
    with pytest.raises(ConfigError, match="half-updated or unverified"):
        pool.add(make(weight_version="dirty-3@abcd").url)
    with pytest.raises(ConfigError, match="context_length"):
        pool.add(make(max_total_tokens=64).url)
    with pytest.raises(ServerUnreachableError):
        pool.add("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="name at least one"):
        pool.add([])
    with pytest.raises(ConfigError, match="is no server of this pool"):
        pool.remove("http://127.0.0.1:9")
    assert [client.url for client in pool.clients] == [first.url]
    sync.close()


def test_the_last_server_that_takes_requests_can_not_be_removed(make: Make) -> None:
    first, second = make(), make()
    pool = pool_of(first, second)
    with pytest.raises(ConfigError, match="a pool needs at least one server"):
        pool.remove([first.url, second.url])
    pool.quarantine(second.url, "it crashed")
    with pytest.raises(ConfigError, match=r"no other server takes requests \(.*it crashed\)"):
        pool.remove(first.url)
    pool.remove(second.url)
    with pytest.raises(ConfigError, match="a pool needs at least one server"):
        pool.remove(first.url)
    assert len(pool.generate(PROMPTS, SHORT)) == len(PROMPTS)


def test_a_server_that_was_added_does_not_serve_behind_a_dead_one(make: Make) -> None:
    first, dead = make(), make()
    pool = pool_of(first, dead)
    dead.stop()
    pool.generate(PROMPTS, SHORT)
    assert list(pool.quarantined) == [dead.url]
    third = make()
    pool.add(third.url)
    pool.remove(dead.url)
    assert {reply.server for reply in pool.generate(PROMPTS, SHORT)} == {first.url, third.url}


def test_while_memory_is_offloaded_no_server_joins_or_leaves(make: Make) -> None:
    pool = pool_of(make(), make())
    first, second = (client.url for client in pool.clients)
    for url in (first, second):
        pool.offload(url, ["weights"])
    with pytest.raises(ConfigError, match="resume_memory"):
        pool.add(make().url)
    with pytest.raises(ConfigError, match="resume_memory"):
        pool.remove(second)
    assert [client.url for client in pool.clients] == [first, second]
    assert not pool.state.has_left(second)


# ---------------------------------------------------------------------------------------------------- each prompt once


def test_a_server_that_leaves_finishes_what_it_has(make: Make) -> None:
    first, second = make(step_s=0.01), make(step_s=0.01)
    pool = pool_of(first, second)
    running = Task(lambda: pool.generate(PROMPTS, LONG), name="generate")
    wait_for(lambda: second in (s for s in (first, second) if "/generate" in paths(s)))
    start = time.monotonic()
    pool.remove(second.url)
    assert time.monotonic() - start > 0.3, "it has waited"
    replies = running.outcome().unwrap()
    assert [len(reply.output_ids) for reply in replies] == [150] * 8
    assert {reply.server for reply in replies} == {first.url, second.url}
    assert paths(first).count("/generate") == 1
    assert {reply.server for reply in pool.generate(PROMPTS, SHORT)} == {first.url}


@pytest.mark.parametrize("how", ["at once", "after a time"])
def test_what_a_server_can_not_finish_is_generated_again_by_the_others(
    make: Make, tensors: dict[str, torch.Tensor], how: str
) -> None:
    first, second = make(step_s=0.005), make(step_s=0.2)  # the second one would take half a minute
    pool = pool_of(first, second)
    running = Task(lambda: pool.generate(PROMPTS, LONG), name="generate")
    wait_for(lambda: "/generate" in paths(second))
    if how == "at once":
        pool.remove(second.url, drain=False)
    else:
        pool.remove(second.url, timeout_s=0.2)
    replies = running.outcome().unwrap()
    assert {reply.server for reply in replies} == {first.url}
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        assert_exact(prompt, reply, tensors)
        assert len(reply.output_ids) == 150


def test_the_requests_of_a_server_that_hangs_are_generated_elsewhere(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrl_sglang.pool.draining._ABORT_TIMEOUT_S", 0.3)
    first, second = make(), make()
    second.arm(Fault(path="/generate", action="freeze"))
    pool = pool_of(first, second)
    running = Task(lambda: pool.generate(PROMPTS, SHORT), name="generate")
    wait_for(lambda: "/generate" in paths(second))
    pool.remove(second.url, drain=False)
    assert running.wait(10)
    assert {reply.server for reply in running.outcome().unwrap()} == {first.url}


def test_a_stream_that_has_shown_nothing_continues_elsewhere(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrl_sglang.pool.draining._ABORT_TIMEOUT_S", 0.3)
    first, second = make(), make()
    pool = pool_of(first, second)
    first.arm(Fault(path="/generate", action="freeze"))
    running = Task(lambda: list(pool.stream(PROMPTS[0], SHORT))[-1], name="stream")
    wait_for(lambda: "/generate" in paths(first))
    pool.remove(first.url, drain=False)
    assert running.wait(10)
    reply = running.outcome().unwrap()
    assert (reply.server, len(reply.output_ids)) == (second.url, 3)


def test_a_removal_that_is_interrupted_before_anything_was_lost_leaves_the_server_in(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(make(), make())
    url = pool.clients[1].url

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(membership, "await_idle", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.remove(url)
    assert not pool.quarantined
    assert url in {reply.server for reply in pool.generate(PROMPTS, SHORT)}


def test_every_prompt_is_answered_once_while_servers_join_and_leave_and_weights_change(
    make: Make, tensors: dict[str, torch.Tensor]
) -> None:
    """Each token is compared with the model of the version that it carries."""
    stable = make(step_s=0.001)
    others = [make(step_s=0.001) for _ in range(3)]
    pool = pool_of(stable)
    sync = WeightSync(pool, SyncConfig(verify="off", pause="abort"))
    versions = {0: tensors}
    done = threading.Event()
    answered: list[tuple[list[int], GenerateReply]] = []
    failures: list[BaseException] = []
    params = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)

    def roll_out(number: int) -> None:
        prompt = 0
        try:
            while not done.is_set():
                batch = [[3 + number, 10 + prompt % 200, 20 + index] for index in range(6)]
                prompt += 1
                replies = pool.generate(batch, params)
                assert len(replies) == len(batch)
                answered.extend(zip(batch, replies, strict=True))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=roll_out, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for step in range(1, 10):
            versions[step] = changed(tensors, float(step))
            sync.push(versions[step])
            other = others[step % 3]
            if other.url in {client.url for client in pool.clients}:
                pool.remove(other.url, drain=step % 2 == 0)
            else:
                pool.add(other.url)
                assert not pool.quarantined
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert not failures, failures[0]
    assert len(answered) > 100
    assert len({reply.server for _, reply in answered}) == 4
    signatures = {number: signature(weights) for number, weights in versions.items()}
    for prompt, reply in answered[:: len(answered) // 300 + 1]:
        assert reply.finish_reason == "abort" or len(reply.output_ids) == 12
        numbers = {int(span.version.split("@")[0]) if "@" in span.version else 0 for span in reply.weight_spans}
        if len(numbers) == 1:
            scores = logprobs(signatures[numbers.pop()], [*prompt, *reply.output_ids], 320)
            assert reply.output_logprobs == pytest.approx(scores[len(prompt) :], abs=1e-5)
    sync.close()


# -------------------------------------------------------------------------------------------------------------- copies


def test_copies_of_a_pool_learn_who_joins_and_who_leaves(make: Make, tensors: dict[str, torch.Tensor]) -> None:
    first, second, third = make(), make(), make()
    pool = pool_of(first, second)
    early, late = pickle.loads(pickle.dumps(pool)), copy.deepcopy(pool)
    early.connect()
    sync = WeightSync(pool, PLAIN)
    sync.push(changed(tensors, 1.0))
    pool.add(third.url)
    pool.remove(second.url)
    second.stop()
    for each in (early, late):  # one that was connected, and one that connects now
        wait_for(lambda each=each: {r.server for r in each.generate(PROMPTS, SHORT)} == {first.url, third.url})
        assert [client.url for client in each.clients] == [first.url, third.url]
        with pytest.raises(ConfigError, match="this pool is a copy"):
            each.add(second.url)
        with pytest.raises(ConfigError, match="this pool is a copy"):
            each.remove(first.url)
    sync.close()


def test_copies_are_not_told_of_a_newcomer_before_it_has_the_weights(
    make: Make, tensors: dict[str, torch.Tensor]
) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    other = pickle.loads(pickle.dumps(pool))
    sync = WeightSync(pool, PLAIN)
    sync.push(iter(tensors.items()))  # can't be sent again: the newcomer has to wait
    pool.add(second.url)
    for _ in range(3):
        assert {reply.server for reply in other.generate(PROMPTS, SHORT)} == {first.url}
    sync.push(iter(tensors.items()))
    wait_for(lambda: {reply.server for reply in other.generate(PROMPTS, SHORT)} == {first.url, second.url})
    sync.close()


def test_a_copy_follows_when_all_servers_were_replaced(make: Make) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    other = pickle.loads(pickle.dumps(pool))
    other.connect()
    pool.add(second.url)
    pool.remove(first.url)
    first.stop()
    assert {reply.server for reply in other.generate(PROMPTS, SHORT)} == {second.url}
    assert [client.url for client in other.clients] == [second.url]


@pytest.mark.parametrize("drain", [True, False])
def test_a_copys_requests_on_a_server_that_leaves_are_answered_once(
    make: Make, tensors: dict[str, torch.Tensor], drain: bool
) -> None:
    first, second = make(step_s=0.01), make(step_s=0.01)
    pool = pool_of(first, second)
    other = pickle.loads(pickle.dumps(pool))
    running = Task(lambda: other.generate(PROMPTS, LONG), name="generate")
    wait_for(lambda: "/generate" in paths(second))
    pool.remove(second.url, drain=drain)
    second.stop()
    replies = running.outcome().unwrap()
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        assert_exact(prompt, reply, tensors)
        assert len(reply.output_ids) == 150
    assert {reply.server for reply in replies} == ({first.url, second.url} if drain else {first.url})


def test_the_file_that_copies_read_is_private_and_ends_with_the_pool(make: Make) -> None:
    pool = pool_of(make())
    path = pool._membership._file.path
    assert not path.exists()
    pool.add(make().url)
    assert path.stat().st_mode & 0o777 == 0o600
    del pool
    import gc

    gc.collect()
    assert not path.exists()


def wait_for(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_pool_without_any_server_left_says_so(make: Make) -> None:
    first = make()
    pool = pool_of(first)
    pool.quarantine(first.url, "a test")
    with pytest.raises(ServerError, match="no server is left"):
        pool.balancer.pick(key="conversation 1")
