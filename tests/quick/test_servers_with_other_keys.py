"""Servers that join a pool with keys of their own: requests, weights, copies, and what does not go."""

from __future__ import annotations

import copy
import pickle
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fake_sglang import FakeServer
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import (
    AsyncSGLang,
    ClientConfig,
    ConfigError,
    RequestRejectedError,
    SamplingParams,
    SyncConfig,
    WeightSync,
)
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import RouterClient, SGLangPool

Make = Callable[..., FakeServer]
PROMPTS = [[index + 3, 7, 8] for index in range(8)]
SHORT = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)
OTHER = ClientConfig(api_key="other", admin_api_key="other-admin")


def servers_of(pool: SGLangPool) -> set[str]:
    return {reply.server for reply in pool.generate(PROMPTS, SHORT)}


def test_a_server_with_keys_of_its_own_generates_takes_weights_and_is_known_to_copies(
    make: Make, tiny_llama: Path
) -> None:
    first, second = make(api_key="one"), make(api_key="other", admin_api_key="other-admin")
    with AsyncSGLang.connect(first.url, api_key="one") as engine:
        pool = engine.pool
        copied = pickle.loads(pickle.dumps(pool))
        assert servers_of(copied) == {first.url}
        with pytest.raises(RequestRejectedError, match="not the one that the server was started with") as refused:
            engine.add(second.url)
        assert "other" not in str(refused.value)
        engine.add(second.url, client=OTHER)
        assert servers_of(pool) == {first.url, second.url}
        sync = WeightSync(pool, SyncConfig(verify="off"))
        trained = {name: tensor + 1 for name, tensor in read_checkpoint(tiny_llama).items()}
        sync.push(trained)
        for server in (first, second):
            assert torch.equal(server.weights[0]["lm_head.weight"], trained["lm_head.weight"])
        deadline = time.monotonic() + 60
        while servers_of(copied) != {first.url, second.url} and time.monotonic() < deadline:
            time.sleep(0.05)
        assert servers_of(copied) == {first.url, second.url}
        sync.close()


def test_the_file_that_copies_read_is_for_its_owner_alone(make: Make) -> None:
    pool = SGLangPool([SGLangClient(make(api_key="one").url, ClientConfig(api_key="one"))])
    pool.connect()
    copied = copy.copy(pool)
    pool.add(make(api_key="other", admin_api_key="other-admin").url, client=OTHER)
    path = pool.__getstate__()["members"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "other-admin" in path.read_text()
    assert "one" not in path.read_text()  # the first server's, which a copy has
    servers_of(copied)
    for thread in threading.enumerate():
        if thread.name == "sglang-new-servers":
            thread.join(60)
    assert len(copied.clients) == 2


def test_a_copy_knows_the_key_of_a_newcomer_that_is_the_only_one_left(make: Make) -> None:
    first, second = make(api_key="one"), make(api_key="other", admin_api_key="other-admin")
    pool = SGLangPool([SGLangClient(first.url, ClientConfig(api_key="one"))])
    pool.connect()
    copied = pickle.loads(pickle.dumps(pool))
    assert servers_of(copied) == {first.url}
    pool.add(second.url, client=OTHER)
    pool.remove(first.url)
    assert servers_of(copied) == {second.url}
    assert servers_of(pickle.loads(pickle.dumps(pool))) == {second.url}


def test_what_can_not_be_honoured_is_refused(make: Make) -> None:
    first, second = make(), make(api_key="other")
    engine = AsyncSGLang.connect(first.url)
    with pytest.raises(ConfigError, match="servers to launch get the keys of the others"):
        engine.add(1, client=OTHER)
    with pytest.raises(ConfigError, match="client must be a ClientConfig"):
        engine.add(second.url, client="other")  # type: ignore[arg-type]
    routed = SGLangPool([SGLangClient(first.url)], router=RouterClient("http://127.0.0.1:1", ClientConfig()))
    with pytest.raises(ConfigError, match="a router sends one key"):
        routed.add(second.url, client=OTHER)
