"""Two senders that share the packed buckets: none is overwritten while one of them still reads it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from torchrl_sglang.weights.transports.bucket_tee import BucketTee


def test_a_bucket_is_packed_only_when_every_reader_has_asked_for_it() -> None:
    asked = {"slow": 0, "fast": 0}
    packed_at: list[dict[str, int]] = []

    def pack() -> Iterator[Any]:
        for number in range(1, 6):
            packed_at.append(dict(asked))
            yield number, None

    tee = BucketTee(pack(), 2)
    readers = {"slow": tee.reader(), "fast": tee.reader()}
    got: dict[str, list[int]] = {"slow": [], "fast": []}

    def read(name: str) -> None:
        while True:
            asked[name] += 1
            item: Any = next(readers[name], None)
            if item is None:
                return
            got[name].append(item[0])
            if name == "slow":
                threading.Event().wait(0.01)

    threads = [threading.Thread(target=read, args=(name,)) for name in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert got == {"slow": [1, 2, 3, 4, 5], "fast": [1, 2, 3, 4, 5]}
    assert all(min(counts.values()) >= number for number, counts in enumerate(packed_at, start=1))


def test_the_others_go_on_when_a_reader_leaves_and_stop_when_packing_fails() -> None:
    def pack() -> Iterator[Any]:
        yield 1, None
        yield 2, None
        raise ValueError("a tensor is gone")

    tee = BucketTee(pack(), 2)
    first, second = tee.reader(), tee.reader()
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(next(second)))
    thread.start()
    assert next(first)[0] == 1
    thread.join(20)
    tee.leave(1)
    assert next(first)[0] == 2
    with pytest.raises(ValueError, match="a tensor is gone"):
        next(first)
