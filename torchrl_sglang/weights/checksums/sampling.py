"""Which tensors a push has hashed: all of a small model, and of a large one a sample that changes from push to push."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torchrl_sglang.weights.buckets.layout import Bucket
from torchrl_sglang.weights.checksums.server_tensors import FusedUnit, canonical_name

__all__ = ["SampleChooser", "skip_list"]

_ALWAYS_BYTES = 64 * 2**10
"""Norms and biases: every push hashes them all, and so at least one tensor of nearly every bucket."""
_FLOOR_BYTES = 8 * 2**20
"""Hashing this much takes some 5 ms: a smaller model is hashed as a whole."""


class SampleChooser:
    """Chooses the sample of each push, so that a tensor's turn comes before another's comes twice.

    Args:
        share: share of the bytes that a push hashes.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._turns: Counter[str] = Counter()

    def choose(self, units: Sequence[FusedUnit], buckets: Sequence[Bucket]) -> list[FusedUnit]:
        """The units to hash after this push.

        All small ones, and one of every bucket that contains no small one, as long as these take at most half of the
        share; then those that have waited longest, until the share is used up. One unit may exceed it.

        Args:
            units: what this push sends.
            buckets: how it sends it.
        """
        sizes = {slot.name: slot.nbytes for bucket in buckets for slot in bucket.slots}
        nbytes = {unit.name: sum(sizes.get(part, 0) for part in unit.parts) for unit in units}
        total = sum(nbytes.values())
        left = total if self._share >= 1 else max(_FLOOR_BYTES, int(self._share * total))
        chosen: dict[str, FusedUnit] = {}
        small = [unit for unit in units if nbytes[unit.name] <= _ALWAYS_BYTES]
        by_turn = sorted(units, key=lambda unit: self._turns[unit.name])
        every_time: list[FusedUnit] = []
        for more in (small, _witnesses(units, buckets, nbytes, small)):
            if sum(nbytes[unit.name] for unit in [*every_time, *more]) <= left / 2:
                every_time += more
        for unit in [*every_time, *by_turn]:
            if unit.name not in chosen and left > 0 and (nbytes[unit.name] <= left or unit is by_turn[0]):
                chosen[unit.name] = unit
                left -= nbytes[unit.name]
        self._turns.update(chosen.keys())
        return [unit for unit in units if unit.name in chosen]


def _witnesses(
    units: Sequence[FusedUnit], buckets: Sequence[Bucket], nbytes: Mapping[str, int], small: Sequence[FusedUnit]
) -> list[FusedUnit]:
    """The smallest unit of each bucket without a small one."""
    unit_of = {part: unit for unit in units for part in unit.parts}
    covered = {unit.name for unit in small}
    smallest: dict[str, FusedUnit] = {}
    for bucket in buckets:
        inside = {unit_of[name].name: unit_of[name] for name in bucket.names if name in unit_of}
        if inside and not covered & inside.keys():
            unit = min(inside.values(), key=lambda unit: nbytes[unit.name])
            smallest[unit.name] = unit
    return list(smallest.values())


def skip_list(units: Iterable[FusedUnit], sample: Iterable[FusedUnit], known_names: Iterable[str]) -> list[str]:
    """What a server must leave out to hash a sample only, as substrings of its names.

    Args:
        units: everything that the checkpoint has.
        sample: what is to be hashed.
        known_names: names that a server was seen to have, where they differ from the expected ones.
    """
    wanted = {canonical_name(name) for unit in sample for name in unit.server_names}
    expected = [name for unit in units for name in unit.server_names]
    unwanted = [name for name in dict.fromkeys([*expected, *known_names]) if canonical_name(name) not in wanted]
    # A server compares every tensor's name with every word: one word for a whole block, where nothing of it is wanted.
    all_wanted = "\n".join(("", *wanted, *(name for unit in sample for name in unit.server_names), ""))
    words: dict[str, None] = {}
    for name in unwanted:
        block = name.rsplit(".", 2)[0] + "."
        word = next((word for word in (block, name) if word not in all_wanted), None)
        if word is not None:
            words[word] = None
    return list(words)
