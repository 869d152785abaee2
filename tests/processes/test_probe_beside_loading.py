"""When the trainer's model computes the log-probs that verification compares, and that nothing uses it afterwards."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from torchrl_sglang import SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool

IN_THREAD = "trainer-logprobs"
two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="no core is idle while a server loads")


@pytest.fixture
def make(tiny_llama: Path) -> Iterator[Callable[..., FakeServer]]:
    with ExitStack() as servers:

        def start(**settings: Any) -> FakeServer:
            settings = {"is_found": True, "model_path": tiny_llama, **settings}
            return servers.enter_context(FakeServer(FakeSettings(**settings)))

        yield start


@pytest.fixture
def model(tiny_llama_b: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_b).train()


def sync_of(*servers: FakeServer, **settings: Any) -> Any:
    config = SyncConfig(verify_atol=1e9, **settings)  # the fake's log-probs are no model's
    return closing(WeightSync(SGLangPool([SGLangClient(server.url) for server in servers]), config))


def threads_of_calls(model: Any) -> list[str]:
    """The thread of each call of the model."""
    threads: list[str] = []
    model.register_forward_pre_hook(lambda *_: threads.append(threading.current_thread().name))
    return threads


@two_cores
@pytest.mark.parametrize(
    ("settings", "is_beside"),
    [
        ({"transport": "ipc"}, True),
        ({"transport": "auto"}, True),
        ({"transport": "ipc", "stage": "off"}, False),  # this thread packs meanwhile
        ({"transport": "broadcast"}, False),  # this process sends meanwhile
        ({"transport": "http"}, False),
    ],
    ids=str,
)
def test_the_model_computes_beside_the_servers_loading_where_this_process_only_waits(
    make: Callable[..., FakeServer], model: Any, settings: dict[str, Any], is_beside: bool
) -> None:
    threads = threads_of_calls(model)
    with sync_of(make(), **settings) as sync:
        report = sync.push(model)
    assert report.max_logprob_gap is not None
    assert [name == IN_THREAD for name in threads] == [is_beside]
    assert model.training


@pytest.mark.parametrize("ranks", [(1, 1, 1), (1, 2)])
def test_no_core_is_taken_from_servers_that_need_all(
    make: Callable[..., FakeServer], model: Any, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    threads = threads_of_calls(model)
    servers = [make(tp_size=tp_size) for tp_size in ranks]
    with sync_of(*servers, transport="ipc") as sync:
        sync.push(model)
    assert threads == [threading.current_thread().name]


@two_cores
def test_a_push_that_fails_returns_when_the_model_is_no_longer_used(
    make: Callable[..., FakeServer], model: Any
) -> None:
    server = make()
    server.arm(Fault(path="/update_weights_from_tensor", action="refuse"))
    refused, ended = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        assert refused.wait(60)

    model.register_forward_pre_hook(wait)
    model.register_forward_hook(lambda *_: ended.set())
    watcher = threading.Thread(target=lambda: (wait_for_refusal(server), refused.set()))
    watcher.start()
    with sync_of(server, transport="ipc") as sync, pytest.raises(WeightUpdateError):
        sync.push(model)
    watcher.join()
    assert ended.is_set()
    assert model.training


def wait_for_refusal(server: FakeServer) -> None:
    """Return when the server was told to end the update that it refused."""
    while not any(event["path"] == "/end_weight_update" for event in list(server.events)):
        threading.Event().wait(0.02)


@two_cores
def test_a_model_that_cannot_be_called_fails_the_verification_and_not_the_update(
    make: Callable[..., FakeServer], model: Any
) -> None:
    server = make()

    def fail(*_: Any) -> None:
        raise RuntimeError("no forward today")

    model.register_forward_pre_hook(fail)
    with sync_of(server, transport="ipc") as sync:
        with pytest.raises(WeightUpdateError, match="can't be verified: .*no forward today"):
            sync.push(model)
        assert any(event["path"] == "/end_weight_update" for event in server.events)
