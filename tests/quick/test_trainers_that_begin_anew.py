"""Pools whose weights another process updates, when its trainer begins anew with lower numbers, or two take turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServer
from tests.fake_sglang.model import read_checkpoint
from tests.quick.pools import PROMPTS, SHORT, pool_of
from torchrl_sglang import ServerUnreachableError, SyncConfig, WeightSync
from torchrl_sglang.pool import PoolState, SGLangPool, dead_servers
from torchrl_sglang.pool.records import WeightState
from torchrl_sglang.protocol.version import WeightVersion

Make = Callable[..., FakeServer]


def seen(*texts: str) -> WeightState:
    weights = WeightState()
    for text in texts:
        weights = weights.having_seen(WeightVersion.parse(text))
    return weights


@pytest.mark.parametrize(
    ("texts", "newest"),
    [
        (["1@a", "2@a", "1@a"], "2@a"),  # a late reply
        (["500@a", "1@b"], "1@b"),  # a trainer that begins anew
        (["500@a", "1@b", "500@a"], "1@b"),  # a late reply from before
        (["1@a", "2@b", "3@a", "4@b"], "4@b"),  # two take turns
        (["7", "8", "default"], "8"),  # another program's numbers, and a server that was restarted
        (["3@a", "my-experiment", "dirty-9@b"], "3@a"),
    ],
)
def test_the_newest_version_is_the_one_that_was_new_last(texts: list[str], newest: str) -> None:
    assert str(seen(*texts).newest_seen) == newest


def test_what_the_servers_held_at_first_counts_as_seen() -> None:
    state = PoolState(["http://a:1", "http://b:1"])
    state.connected({"http://a:1": "7@a", "http://b:1": "dirty-8@a"})
    assert str(state.weights.newest_seen) == "7@a"
    state.weights_served(WeightVersion(number=3, owner="ours"))  # after a resume
    state.replies_seen(["7@a"])  # late
    assert str(state.weights.newest_seen) == "3@ours"


def test_a_restarted_server_with_the_new_trainers_lower_number_is_used_again(
    make: Make, replace: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_servers, "_POLL_INTERVAL_S", 0.05)
    first, second = make(weight_version="500@old"), make(weight_version="500@old")
    pool = pool_of(first, second)
    for server in (first, second):
        server.set_state(weight_version="3@new")
    assert {reply.weight_version for reply in pool.generate(PROMPTS, SHORT)} == {"3@new"}
    for version, is_current in (("500@old", False), ("2@new", False), ("3@new", True)):
        second.stop()
        pool.generate(PROMPTS, SHORT)
        second = replace(second, weight_version=version)
        looked = sum(event["path"] == "/model_info" for event in second.events) + 2
        deadline = time.monotonic() + 60
        while pool.quarantined and time.monotonic() < deadline:
            pool.generate(PROMPTS, SHORT)
            if sum(event["path"] == "/model_info" for event in second.events) > looked:
                break
            time.sleep(0.02)
        assert (not pool.quarantined) == is_current, version


def test_a_single_server_whose_version_has_no_number_is_used_again(make: Make, replace: Make) -> None:
    server = make(weight_version="release-candidate")
    pool = pool_of(server)
    server.stop()
    pool.record_death(server.url, _gone(pool))
    replace(server, weight_version="release-candidate")
    assert len(pool.generate(PROMPTS, SHORT)) == len(PROMPTS)


def _gone(pool: SGLangPool) -> ServerUnreachableError:
    with pytest.raises(ServerUnreachableError, match="nothing accepts connections") as caught:
        pool.clients[0].weight_version()
    return caught.value


def test_trainers_that_take_turns_give_no_number_twice(make: Make, tiny_llama: Path) -> None:
    server = make()
    pools = [pool_of(server), pool_of(server)]
    tensors = read_checkpoint(tiny_llama)
    numbers = []
    with ExitStack() as stack:
        config = SyncConfig(verify="off", transport="http")
        trainers = [stack.enter_context(closing(WeightSync(pool, config))) for pool in pools]
        for _ in range(2):
            for pool, trainer in zip(pools, trainers, strict=True):
                pool.generate(PROMPTS, SHORT)
                report = trainer.push(tensors)
                assert report is not None
                numbers.append(report.version)
    assert numbers == [1, 2, 3, 4]
