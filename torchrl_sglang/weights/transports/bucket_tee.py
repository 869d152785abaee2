"""Gives the same packed buckets to several senders, which run in threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

from torchrl_sglang.weights.buckets.layout import Bucket

__all__ = ["BucketTee"]


class BucketTee:
    """Packs a bucket when all readers ask for it, since a reader that asks for one has sent the one before the last.

    Args:
        packed: the buckets and their bytes.
        num_readers: number of :meth:`reader` calls that follow.

    Examples:
        >>> tee = BucketTee(iter([("first", None), ("second", None)]), 1)
        >>> [bucket for bucket, _ in tee.reader()]
        ['first', 'second']
    """

    def __init__(self, packed: Iterator[tuple[Bucket, torch.Tensor]], num_readers: int) -> None:
        self._packed = packed
        self._positions = [0] * num_readers
        self._active = set(range(num_readers))
        self._given = 0
        self._number = 0
        self._item: tuple[Bucket, torch.Tensor] | None = None
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def reader(self) -> Iterator[tuple[Bucket, torch.Tensor]]:
        """The buckets for one sender, who closes the iterator or reads it to the end."""
        with self._changed:
            index, self._given = self._given, self._given + 1
        return self._read(index)

    def stop(self, error: BaseException) -> None:
        """Raise ``error`` in every reader that asks for a bucket."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def leave(self, index: int) -> None:
        """Go on without a reader; they are numbered in the order in which they were made."""
        with self._changed:
            self._active.discard(index)
            self._changed.notify_all()

    def _read(self, index: int) -> Iterator[tuple[Bucket, torch.Tensor]]:
        try:
            number = 0
            while True:
                number += 1
                item = self._item_of(index, number)
                if item is None:
                    return
                yield item
        finally:
            self.leave(index)

    def _item_of(self, index: int, number: int) -> tuple[Bucket, torch.Tensor] | None:
        with self._changed:
            self._positions[index] = number
            while self._number < number:
                if self._error is not None:
                    raise self._error
                if all(self._positions[each] >= number for each in self._active):
                    self._pack(number)
                    self._changed.notify_all()
                else:
                    self._changed.wait()
            return self._item

    def _pack(self, number: int) -> None:
        try:
            self._item = next(self._packed, None)
            self._number = number
        except BaseException as error:
            self._error = error
            raise
