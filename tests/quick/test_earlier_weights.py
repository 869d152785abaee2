"""Servers that hold weights of an earlier run: whoever connects is warned, and told how to send his own first."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from tests.fake_sglang import FakeServer, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, SGLangWrapper, SyncConfig
from torchrl_sglang.pool.earlier_weights import earlier_weights

WARNING = r"holds weights of an earlier run \(version '{}'\).*servers.update_weights\(model\)"
PLAIN = SyncConfig(verify="off")


@pytest.fixture
def make(tiny_llama: Path) -> Iterator[Callable[[str], FakeServer]]:
    made: list[FakeServer] = []

    def start(version: str) -> FakeServer:
        made.append(FakeServer(FakeSettings(model_path=tiny_llama, weight_version=version)).__enter__())
        return made[-1]

    yield start
    for server in made:
        server.__exit__(None, None, None)


@pytest.mark.parametrize("version", ["12@a1b2c3d4", "3", "my-experiment"])
@pytest.mark.parametrize("use", [AsyncSGLang.connect, lambda url: SGLangWrapper(url, input_mode="tokens")])
def test_connecting_to_trained_servers_warns_and_names_the_call(
    make: Callable[[str], FakeServer], use: Any, version: str
) -> None:
    with pytest.warns(UserWarning, match=WARNING.format(version)) as caught:
        use(make(version).url)
    assert len(caught) == 1
    if use is AsyncSGLang.connect:
        assert caught[0].filename == __file__, "the warning points into this package"


@pytest.mark.parametrize("version", ["default", "0", "dirty-3@a1b2"])
def test_servers_with_their_checkpoints_weights_and_quarantined_ones_warn_of_nothing(
    make: Callable[[str], FakeServer], version: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AsyncSGLang.connect(make(version).url).shutdown()


def test_after_an_update_nothing_is_earlier(make: Callable[[str], FakeServer], tiny_llama: Path) -> None:
    with pytest.warns(UserWarning, match="earlier run"):
        servers = AsyncSGLang.connect(make("7@old").url)
    assert len(earlier_weights(servers.pool)) == 1
    scheme = SGLangWeightSyncScheme(servers, config=PLAIN)
    servers.update_weights(read_checkpoint(tiny_llama))
    assert servers.weight_version == 8
    assert earlier_weights(servers.pool) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheme.connect()
        pickle.loads(pickle.dumps(servers)).generate(input_ids=[5], max_new_tokens=1)  # a worker's copy
    servers.shutdown()


def roll_out(scheme: SGLangWeightSyncScheme) -> None:
    """What a collector's constructor does with a scheme, and its first rollout."""
    policy = SGLangWrapper(scheme.pool, input_mode="tokens", generate_kwargs={"max_new_tokens": 1})
    scheme.init_on_sender(model_id="policy", context=None)
    scheme.connect()
    policy(TensorDict({("tokens", "prompt"): torch.tensor([[5]])}, batch_size=1))


def test_a_scheme_with_a_model_sends_it_before_the_first_rollout(
    make: Callable[[str], FakeServer], tiny_llama: Path
) -> None:
    server = make("7@old")
    scheme = SGLangWeightSyncScheme(server.url, model=read_checkpoint(tiny_llama), config=PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        roll_out(scheme)
    paths = [event["path"] for event in server.events]
    assert paths.index("/end_weight_update") < paths.index("/generate")
    assert scheme.pool.weight_version == 8
    scheme.shutdown()


def test_a_scheme_without_a_model_warns_when_it_connects(make: Callable[[str], FakeServer]) -> None:
    server = make("7@old")
    scheme = SGLangWeightSyncScheme(server.url, config=PLAIN)
    with pytest.warns(UserWarning, match=r"SGLangWeightSyncScheme\(servers, model=model\)"):
        roll_out(scheme)
    scheme.shutdown()


def test_a_scheme_connects_without_a_collector_and_serves_one_afterwards(make: Callable[[str], FakeServer]) -> None:
    server = make("default")
    scheme = SGLangWeightSyncScheme(server.url, config=PLAIN)
    scheme.connect()
    scheme.connect()
    assert scheme.pool.info.url == server.url
    roll_out(scheme)
    scheme.shutdown()
