"""Streams and agents' turns that wait on a paused server while their adapter is replaced there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM

from tests.agent_kit import run
from tests.fake_sglang import FakeServer
from tests.quick.test_agents_generation import ask, paths
from torchrl_sglang import RequestRejectedError, SamplingParams, SyncConfig, WeightSync
from torchrl_sglang.agents.served_model import ServedModel
from torchrl_sglang.agents.sessions import Sessions
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_continue, build_pause, build_unload_lora
from torchrl_sglang.protocol.version import version_number

SHORT = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)


class Trainer:
    """Pushes adapters to a pool with one server, which it can hold paused."""

    def __init__(self, pool: SGLangPool, server: FakeServer, model_path: Path) -> None:
        self.pool, self.server = pool, server
        self.sync = WeightSync(pool, SyncConfig(verify="off", transport="lora"))
        base = AutoModelForCausalLM.from_pretrained(model_path)
        self.model: Any = peft.get_peft_model(
            base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        )

    @property
    def adapter(self) -> str | None:
        current = self.pool.state.weights.adapter
        return None if current is None else current.name

    def pause(self) -> None:
        self.pool.clients[0].send(build_pause("retract"))

    def await_requests(self, num_requests: int) -> None:
        deadline = time.monotonic() + 20
        while paths(self.server, "/generate") < num_requests:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def replace_adapter_behind(self, num_requests: int) -> None:
        """Push until the adapter of these waiting requests is unloaded, then let the server continue."""
        self.await_requests(num_requests)
        for _ in range(2):
            self.sync.push(self.model)
        self.pool.clients[0].send(build_continue())


@pytest.fixture
def server(make: Callable[..., FakeServer]) -> FakeServer:
    return make(enable_lora=True)


@pytest.fixture
def trainer(server: FakeServer, tiny_llama: Path) -> Iterator[Trainer]:
    pool = SGLangPool([SGLangClient(server.url)])
    pool.connect()
    made = Trainer(pool, server, tiny_llama)
    made.sync.push(made.model)
    yield made
    made.sync.close()
    pool.close()


def test_a_stream_is_answered_with_the_current_one(trainer: Trainer) -> None:
    trainer.pause()
    streaming = Task(lambda: list(trainer.pool.stream([5, 6, 7], SHORT)), name="stream")
    trainer.replace_adapter_behind(1)
    last = streaming.outcome().unwrap()[-1]
    current = trainer.pool.state.weights.adapter
    assert current is not None
    assert last.weight_version == current.version
    assert len(last.output_ids) == 3


def test_a_stream_with_an_adapter_of_its_callers_choice_is_not(trainer: Trainer) -> None:
    trainer.pause()
    first = trainer.adapter
    streaming = Task(lambda: list(trainer.pool.stream([5, 6, 7], SHORT, lora=first)), name="stream")
    trainer.replace_adapter_behind(1)
    with pytest.raises(RequestRejectedError, match="implicitly load LoRA adapter"):
        streaming.outcome().unwrap()


@pytest.mark.parametrize("streams", [False, True])
def test_an_agents_turn_is_answered_with_the_current_one(trainer: Trainer, streams: bool) -> None:
    sessions = Sessions(ServedModel(trainer.pool))
    session = sessions.create()
    seen: list[Any] = []

    async def story() -> Any:
        trainer.pause()
        turn = asyncio.ensure_future(session.chat(ask(), seen.append if streams else None))
        await asyncio.to_thread(trainer.replace_adapter_behind, 1)
        return await turn

    choice = run(story()).choices[0]
    current = trainer.pool.state.weights.adapter
    assert current is not None
    assert list(choice.weight_versions) == [version_number(current.version)] * 8
    run(sessions.close())


def test_after_a_first_adapter_that_failed_its_verification_the_base_model_answers(trainer: Trainer) -> None:
    trainer.pause()
    waiting = Task(lambda: trainer.pool.generate([[5, 6, 7]], SHORT), name="generate")
    trainer.await_requests(1)
    name = trainer.adapter
    assert name is not None
    trainer.pool.state.adapter_switched(None)  # as AdapterSession.reject
    trainer.pool.clients[0].send(build_unload_lora(name))
    trainer.pool.clients[0].send(build_continue())
    (reply,) = waiting.outcome().unwrap()
    assert reply.weight_version == "default"


def test_an_adapter_is_pushed_again_under_the_same_version(trainer: Trainer) -> None:
    names = []
    for _ in range(4):
        assert trainer.sync.push(trainer.model, version=7) is not None
        (reply,) = trainer.pool.generate([[1, 2, 3]], SHORT)
        assert version_number(reply.weight_version) == 7
        names.append(trainer.adapter)
    assert len(set(names)) == len(names), "requests under way go on with the one that they began with"
