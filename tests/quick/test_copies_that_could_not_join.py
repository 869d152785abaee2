"""A copy of a pool that could not reach a newcomer tries again."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable

from tests.fake_sglang import FakeServer, Fault
from torchrl_sglang import SamplingParams
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool

SHORT = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)
PROMPTS = [[index + 3, 7, 8] for index in range(8)]


def used(copied: SGLangPool) -> set[str]:
    """The servers of the second of two batches: the first one looks for newcomers."""
    copied.generate(PROMPTS, SHORT)
    for thread in threading.enumerate():
        if thread.name == "sglang-new-servers":
            thread.join()
    return {reply.server for reply in copied.generate(PROMPTS, SHORT)}


def test_it_uses_the_newcomer_later(make: Callable[..., FakeServer]) -> None:
    first, second = make(), make()
    pool = SGLangPool([SGLangClient(first.url)])
    pool.connect()
    copied: SGLangPool = pickle.loads(pickle.dumps(pool))
    copied.connect()
    pool.add(second.url)
    second.arm(Fault(path="*", action="drop", times=0))
    assert used(copied) == {first.url}
    second.disarm()
    assert used(copied) == {first.url}, "it tries every ten seconds"
    copied._copied._read_again_at = 0.0
    assert used(copied) == {first.url, second.url}


def test_one_that_leaves_while_it_joins_is_not_kept(make: Callable[..., FakeServer]) -> None:
    first, second = make(), make()
    pool = SGLangPool([SGLangClient(first.url)])
    pool.connect()
    copied: SGLangPool = pickle.loads(pickle.dumps(pool))
    copied.connect()
    pool.add(second.url)
    connect = SGLangClient.connect

    def slow(self: SGLangClient) -> object:
        if self.url == second.url:
            pool.remove(second.url)
            copied._copied.refresh()
        return connect(self)

    try:
        SGLangClient.connect = slow  # type: ignore[method-assign, assignment]
        copied.generate(PROMPTS, SHORT)
        for thread in threading.enumerate():
            if thread.name == "sglang-new-servers":
                thread.join()
    finally:
        SGLangClient.connect = connect  # type: ignore[method-assign]
    assert used(copied) == {first.url}
    assert [client.url for client in copied.clients] == [first.url]
