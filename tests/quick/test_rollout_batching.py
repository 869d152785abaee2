"""Batcher: calls of many threads become few batches, and each call gets its own results, errors and deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

import pytest

from torchrl_sglang.rollout.batching import Batcher


def at_once(calls: Sequence[Callable[[], object]]) -> list[object]:
    """Run calls in threads; returns per call its result or exception."""
    results: list[object] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except (RuntimeError, CancelledError) as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return results


def test_each_call_gets_the_results_of_its_own_items() -> None:
    batches: list[list[int]] = []

    def run(items: Sequence[int]) -> list[int]:
        batches.append(list(items))
        return [10 * item for item in items]

    batcher: Batcher[int, int] = Batcher(min_items=12, wait_s=60)
    results = at_once([lambda i=i: batcher.submit([i, i + 100], run) for i in range(6)])
    assert results == [[10 * i, 10 * i + 1000] for i in range(6)]
    assert len(batches) == 1


def test_no_batch_is_larger_than_allowed_unless_one_call_is() -> None:
    sizes: list[int] = []

    def run(items: Sequence[int]) -> Sequence[int]:
        sizes.append(len(items))
        return items

    batcher: Batcher[int, int] = Batcher(min_items=8, max_items=3, wait_s=60)
    assert len(batcher.submit([1] * 8, run)) == 8
    assert sizes == [8]
    sizes.clear()
    batcher = Batcher(min_items=1, max_items=3, wait_s=60)
    at_once([lambda: batcher.submit([1], run) for _ in range(8)])
    assert sum(sizes) == 8
    assert max(sizes) <= 3


def test_a_single_call_runs_when_its_wait_is_over() -> None:
    batcher: Batcher[int, int] = Batcher(min_items=100, wait_s=0.05)
    assert batcher.submit([7], lambda items: items) == [7]


def test_calls_that_come_shortly_one_after_the_other_are_one_batch() -> None:
    sizes: list[int] = []

    def run(items: Sequence[int]) -> Sequence[int]:
        sizes.append(len(items))
        return items

    batcher: Batcher[int, int] = Batcher(min_items=1)
    start = threading.Barrier(16)

    def call(index: int) -> Sequence[int]:
        start.wait(60)
        return batcher.submit([index], run)

    assert at_once([lambda i=i: call(i) for i in range(16)]) == [[i] for i in range(16)]
    assert len(sizes) < 8, "hardly any calls were merged"


def test_a_batch_does_not_wait_for_the_one_before() -> None:
    batches: list[list[int]] = []
    running, more = threading.Event(), threading.Event()

    def run(items: Sequence[int]) -> Sequence[int]:
        batches.append(list(items))
        if 0 in items:
            running.set()
            assert more.wait(60)
        return items

    batcher: Batcher[int, int] = Batcher(min_items=1, max_items=3, wait_s=60)
    first = threading.Thread(target=lambda: batcher.submit([0], run))
    first.start()
    assert running.wait(60)
    assert at_once([lambda i=i: batcher.submit([i], run) for i in (1, 2, 3)]) == [[1], [2], [3]]
    assert batcher.state == {"queue_size": 0, "pending_futures": 0, "processing": True}
    more.set()
    first.join(timeout=60)
    assert not first.is_alive()
    assert batches[0] == [0]
    assert sorted(item for batch in batches[1:] for item in batch) == [1, 2, 3]
    assert not batcher.state["processing"]


def test_a_caller_never_waits_for_a_batch_of_other_calls() -> None:
    running, more = threading.Event(), threading.Event()

    def run(items: Sequence[int]) -> Sequence[int]:
        if 0 in items:
            running.set()
            assert more.wait(60)
        return items

    batcher: Batcher[int, int] = Batcher(min_items=6, max_items=4, wait_s=60)
    first = threading.Thread(target=lambda: batcher.submit([0, 1, 2], run))
    first.start()
    while batcher.state["pending_futures"] == 0:
        time.sleep(0.005)
    # 6 items are there, 3 of which fit into the first batch
    second = threading.Thread(target=lambda: batcher.submit([3, 4, 5], run))
    second.start()
    assert running.wait(60)
    batcher.flush()
    second.join(timeout=30)
    assert not second.is_alive()
    more.set()
    first.join(timeout=60)


def test_an_error_reaches_every_caller_of_its_batch_and_no_other() -> None:
    def fail(items: Sequence[int]) -> Sequence[int]:
        raise RuntimeError(f"could not run {len(items)}")

    batcher: Batcher[int, int] = Batcher(min_items=3, wait_s=60)
    failed = at_once([lambda: batcher.submit([1], fail, kind="a") for _ in range(3)])
    assert [str(error) for error in failed] == ["could not run 3"] * 3
    assert batcher.submit([1, 2, 3], lambda items: items, kind="b") == [1, 2, 3]


def test_a_batch_that_loses_results_is_an_error() -> None:
    batcher: Batcher[int, int] = Batcher()
    with pytest.raises(RuntimeError, match="a batch of 2 items gave 1 results"):
        batcher.submit([1, 2], lambda items: items[:1])


@pytest.mark.parametrize("end", ["cancel", "flush"])
def test_waiting_calls_can_be_cancelled_or_sent_at_once(end: str) -> None:
    batcher: Batcher[int, int] = Batcher(min_items=100, wait_s=60)

    def end_soon() -> None:
        deadline = time.monotonic() + 60
        while batcher.state["pending_futures"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        getattr(batcher, end)()

    result, _ = at_once([lambda: batcher.submit([7], lambda items: items), end_soon])
    if end == "cancel":
        assert isinstance(result, CancelledError)
    else:
        assert result == [7]
