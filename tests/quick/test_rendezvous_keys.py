"""The rendezvous counts the ranks of its own group: the store may hold keys of others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed import PrefixStore

from torchrl_sglang import WeightUpdateError
from torchrl_sglang.parallel import Task
from torchrl_sglang.weights.group.rendezvous import JoinCall, Rendezvous, await_ranks


class Client:
    url = "http://server:30000"


@pytest.fixture
def rendezvous() -> Iterator[Rendezvous]:
    made = Rendezvous("torchrl-sglang-mine.2.90", "127.0.0.1", None, timeout_s=5)
    yield made
    made.end()


def joining(ranks: range, answer: Any = None) -> JoinCall:
    """A server that has not answered the call to join yet: gloo's ranks answer when all are connected."""
    return JoinCall(Client(), ranks, Task(lambda: time.sleep(2), name="join"))  # type: ignore[arg-type]


def arrive(rendezvous: Rendezvous, group: str, *ranks: int) -> None:
    store = PrefixStore("cpu/", PrefixStore(f"{group}/", PrefixStore(group, rendezvous.store)))
    for rank in ranks:
        store.set(f"0/{rank}", "address")


def test_ranks_of_an_earlier_group_that_arrive_late_do_not_count(rendezvous: Rendezvous) -> None:
    """A fixed port is used by one group after the other, and a server retries an address for as long as it may."""
    joins = [joining(range(1, 3)), joining(range(3, 4))]
    arrive(rendezvous, "torchrl-sglang-mine.1.90", 1, 2, 3)
    arrive(rendezvous, "torchrl-sglang-other.7.90", 1, 2, 3)
    arrive(rendezvous, rendezvous.name, 1, 3)
    with pytest.raises(WeightUpdateError, match="http://server:30000 did not arrive"):
        await_ranks(rendezvous, joins, "gloo", time.monotonic() + 0.3)
    assert not rendezvous.has(joins)
    assert rendezvous.has(joins[1:])
    arrive(rendezvous, rendezvous.name, 2)
    await_ranks(rendezvous, joins, "gloo", time.monotonic() + 0.3)
