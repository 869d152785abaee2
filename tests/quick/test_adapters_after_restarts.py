"""The trainer's adapter, and its last weights, on servers whose process was replaced: before their next requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fake_sglang import FakeServer
from tests.fake_sglang.model import read_checkpoint
from tests.quick.pools import PROMPTS, SHORT, pool_of, servers_of
from torchrl_sglang import RequestRejectedError, ServerError, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.engine.monitor import admit, restart_server
from torchrl_sglang.pool import SGLangPool, dead_servers
from torchrl_sglang.weights.transports.http import HttpTransport

Make = Callable[..., FakeServer]


@pytest.fixture(autouse=True)
def dead_servers_are_polled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_servers, "_POLL_INTERVAL_S", 0.2)


class Process:
    """A server process for the monitor, which starts a new fake server."""

    def __init__(self, server: FakeServer, replace: Make, **settings: Any) -> None:
        self.server = server
        self._replace, self._settings = replace, settings

    def kill(self) -> None: ...

    def stop(self, *, kill: bool) -> None: ...

    def start(self, *, progress: Any, weight_version: str | None) -> None:
        version = {} if weight_version is None else {"weight_version": weight_version}
        self.server = self._replace(self.server, **self._settings, **version)


def adapted(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


def answers(pool: SGLangPool) -> list[tuple[list[int], str]]:
    return [(reply.output_ids, reply.weight_version) for reply in pool.generate(PROMPTS, SHORT)]


def wait_until_both_answer(pool: SGLangPool) -> None:
    deadline = time.monotonic() + 60
    while len(servers_of(pool)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(servers_of(pool)) == 2


def test_a_server_that_somebody_restarts_gets_the_adapter_again_and_no_prompt_is_lost(
    make: Make, tiny_llama: Path, replace: Make
) -> None:
    first, second = make(enable_lora=True), make(enable_lora=True)
    pool = pool_of(first, second)
    with closing(WeightSync(pool, SyncConfig(verify="off", transport="lora"))) as sync:
        sync.push(adapted(tiny_llama))
        sync.push(adapted(tiny_llama))
        expected = answers(pool)
        assert {version for _, version in expected} == {f"2@{sync.owner}"}
        replace(second, enable_lora=True)  # no request was under way: only the missing adapter shows it
        assert answers(pool) == expected
        assert "never been loaded" in pool.quarantined[second.url]
        wait_until_both_answer(pool)
        assert answers(pool) == expected


def test_a_single_server_that_somebody_restarts_is_used_again_after_one_error(
    make: Make, tiny_llama: Path, replace: Make
) -> None:
    server = make(enable_lora=True)
    pool = pool_of(server)
    with closing(WeightSync(pool, SyncConfig(verify="off", transport="lora"))) as sync:
        sync.push(adapted(tiny_llama))
        expected = answers(pool)
        replace(server, enable_lora=True)
        with pytest.raises(RequestRejectedError, match="never been loaded"):
            pool.generate(PROMPTS, SHORT)
        assert answers(pool) == expected


def test_prompts_are_not_blamed_when_somebody_restarts_all_servers(make: Make, tiny_llama: Path, replace: Make) -> None:
    servers = [make(enable_lora=True) for _ in range(2)]
    pool = pool_of(*servers)
    with closing(WeightSync(pool, SyncConfig(verify="off", transport="lora"))) as sync:
        sync.push(adapted(tiny_llama))
        expected = answers(pool)
        for server in servers:
            replace(server, enable_lora=True)
        with pytest.raises(ServerError, match="no server is left.*never been loaded"):
            pool.generate(PROMPTS, SHORT)
        assert answers(pool) == expected


def test_a_server_with_another_base_model_gets_no_adapter(make: Make, tiny_llama: Path, replace: Make) -> None:
    first, second = make(enable_lora=True), make(enable_lora=True)
    pool = pool_of(first, second)
    with closing(WeightSync(pool, SyncConfig(verify="off", transport="lora"))) as sync:
        sync.push(adapted(tiny_llama))
        expected = answers(pool)
        other = replace(second, enable_lora=True, weight_version="7@x")
        assert answers(pool) == expected
        deadline = time.monotonic() + 60
        while "same base model" not in pool.quarantined[second.url] and time.monotonic() < deadline:
            assert servers_of(pool) == {first.url}
            time.sleep(0.1)
        assert "an adapter needs the same base model everywhere" in pool.quarantined[second.url]
        assert not [event for event in other.events if "lora" in event["path"]]


def restart(pool: SGLangPool, index: int, process: Process) -> bool:
    """What the engine's monitor does with a crashed server; whether it gets requests."""
    client: SGLangClient = pool.clients[index]
    assert pool.state.restart_begun(client.url)
    pool.quarantine(client.url, "it crashed and is being restarted")
    is_current = restart_server(pool, client, process)  # type: ignore[arg-type]
    with pool.update_lock:
        return admit(pool, client, is_current=is_current, update=True)


def test_a_crashed_server_that_its_engine_restarts_gets_the_adapter(
    make: Make, tiny_llama: Path, replace: Make
) -> None:
    first, second = make(enable_lora=True), make(enable_lora=True)
    pool = pool_of(first, second)
    with closing(WeightSync(pool, SyncConfig(verify="off", transport="lora"))) as sync:
        sync.push(adapted(tiny_llama))
        expected = answers(pool)
        assert restart(pool, 1, Process(second, replace, enable_lora=True))
        assert servers_of(pool) == {first.url, second.url}
        assert answers(pool) == expected


@pytest.mark.parametrize("transport", ["broadcast", "http"])
def test_a_crashed_server_gets_the_weights_of_the_last_push_if_the_trainer_still_has_them(
    make: Make, tiny_llama: Path, replace: Make, transport: Any
) -> None:
    first, second = make(), make()
    pool = pool_of(first, second)
    trained = {name: tensor + 1 for name, tensor in read_checkpoint(tiny_llama).items()}
    with closing(WeightSync(pool, SyncConfig(verify="off", transport=transport))) as sync:
        sync.push(trained)
        expected = answers(pool)
        process = Process(second, replace)
        assert restart(pool, 1, process)
        assert torch.equal(process.server.weights[0]["lm_head.weight"], trained["lm_head.weight"])
        assert servers_of(pool) == {first.url, second.url}
        assert answers(pool) == expected
        for tensor in trained.values():
            tensor.add_(1)  # the trainer goes on: these are the weights of the next push
        assert not restart(pool, 1, process)
        assert servers_of(pool) == {first.url}
        sync.push(trained)
        assert servers_of(pool) == {first.url, second.url}


def test_a_crashed_server_that_got_tensors_of_two_steps_of_the_trainer_is_not_used(
    make: Make, tiny_llama: Path, replace: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make()  # alone: there is no other to compare with
    pool = pool_of(server)
    trained = {name: tensor + 1 for name, tensor in read_checkpoint(tiny_llama).items()}
    send = HttpTransport.send

    def send_beside_training(self: HttpTransport, *arguments: Any) -> None:
        send(self, *arguments)
        for tensor in trained.values():
            tensor.add_(1)

    with closing(WeightSync(pool, SyncConfig(verify="off", transport="http"))) as sync:
        sync.push(trained)
        with monkeypatch.context() as patch:
            patch.setattr(HttpTransport, "send", send_beside_training)
            assert not restart(pool, 0, Process(server, replace))
        assert not pool.healthy
        sync.push(trained)
        assert servers_of(pool) == {server.url}
