"""Compares servers' hashes with those of the bytes sent, and learns how each kind of tensor is laid out on a server.

A hash that equals that of any layout shows that the server holds the bytes that were sent. One that equals none shows
the opposite only where the layout is known: a server may pack, cast or quantise a tensor in a way that is not computed
here. A layout is known once it has matched for a tensor of the same kind on the same server, or once it matches the
tensor that the server held before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torchrl_sglang.weights.checksums.server_tensors import FusedUnit, kind_of

__all__ = ["Finding", "Hashes", "LayoutRules", "TensorId", "Verdict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorId:
    """One tensor of one rank of a server.

    Attributes:
        url: the server.
        name: the server's name of the tensor.
        rank: position of the rank in the server's answer.
        tp_rank: its tensor-parallel rank.
    """

    url: str
    name: str
    rank: int = 0
    tp_rank: int = 0

    def __str__(self) -> str:
        return self.name if self.rank == 0 else f"{self.name} (rank {self.rank})"


class Hashes(Protocol):
    """Hashes that a server's tensor would have, made from some values of the checkpoint's tensors."""

    def of(self, unit: FusedUnit, tensor: TensorId, layout: str | None = None) -> Iterator[tuple[str, str]]:
        """Pairs of a layout and the hash in it, the expected layout first; none if the values of the unit are unknown.

        Args:
            unit: what the checkpoint has.
            tensor: which tensor of which server.
            layout: only this layout.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A hash that a server reported for a tensor of the sample.

    Attributes:
        tensor: which one.
        unit: what the checkpoint has for it.
        is_exact: whether the server's name is the expected one, not merely one that resembles it.
        shapes: of the unit's parts.
        actual: the hash.
    """

    tensor: TensorId
    unit: FusedUnit
    is_exact: bool
    shapes: tuple[tuple[int, ...], ...]
    actual: str

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for tensors that are laid out alike: those of one kind, shape and server."""
        return (self.tensor.url, kind_of(self.tensor.name), self.shapes)


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What a comparison found.

    Attributes:
        stale: tensors that are not what was sent.
        unproven: tensors of which that can't be told.
        num_equal: number of tensors that are what was sent.
    """

    stale: list[TensorId] = field(default_factory=list)
    unproven: list[TensorId] = field(default_factory=list)
    num_equal: int = 0


class LayoutRules:
    """What is known of the servers' layouts, and the hashes of tensors whose layout is unknown; kept between pushes."""

    def __init__(self) -> None:
        self._layout_of: dict[tuple[object, ...], str] = {}
        self._last_seen: dict[TensorId, tuple[str, frozenset[str] | None]] = {}

    def layout(self, kind: tuple[object, ...]) -> str | None:
        """The layout of tensors of this kind (:attr:`Finding.kind`), if it is known."""
        return self._layout_of.get(kind)

    def forget_values(self, url: str) -> None:
        """The process at this address is a new one: it holds other tensors than those seen last."""
        self._last_seen = {tensor: seen for tensor, seen in self._last_seen.items() if tensor.url != url}

    def seen_before_push(self, findings: Iterable[Finding]) -> None:
        """Hashes that servers report before the first push to them."""
        self._last_seen.update((finding.tensor, (finding.actual, None)) for finding in findings)

    def judge(self, findings: Sequence[Finding], sent: Hashes, held_before: Hashes | None) -> Verdict:
        """Compare what servers report after a push.

        Args:
            findings: what they report.
            sent: hashes of what was sent.
            held_before: hashes of what the servers held before this push, if that is known.
        """
        different = [finding for finding in findings if not self._is_equal(finding, sent)]
        verdict = Verdict(num_equal=len(findings) - len(different))
        for finding in different:
            known = self.layout(finding.kind)  # perhaps since a tensor later in the list was looked at
            if known is not None and any(True for _ in sent.of(finding.unit, finding.tensor, known)):
                verdict.stale.append(finding.tensor)
                continue
            hashes = frozenset(value for _, value in sent.of(finding.unit, finding.tensor))
            if hashes and self._was_left(finding, hashes, held_before):
                verdict.stale.append(finding.tensor)
            else:
                verdict.unproven.append(finding.tensor)
                self._last_seen[finding.tensor] = (finding.actual, hashes)
        return verdict

    def _is_equal(self, finding: Finding, sent: Hashes) -> bool:
        for layout, value in sent.of(finding.unit, finding.tensor, self.layout(finding.kind)):
            if value == finding.actual:
                self._layout_of[finding.kind] = layout
                return True
        return False

    def _was_left(self, finding: Finding, sent: frozenset[str], held_before: Hashes | None) -> bool:
        """Whether a tensor of unknown layout still is what it was before, although other values were sent."""
        seen, sent_before = self._last_seen.get(finding.tensor, ("", None))
        before: Mapping[str, str] = {}
        if sent_before is None and held_before is not None:
            before = dict(held_before.of(finding.unit, finding.tensor))
            for layout, value in before.items():
                if value in (finding.actual, seen):
                    self._layout_of[finding.kind] = layout
                    return True
        values_before = sent_before or frozenset(before.values())
        # Hashes of equal values agree in every layout that was computed both times, and the likeliest always is.
        has_changed = bool(values_before) and not values_before & sent
        return finding.is_exact and finding.actual == seen and has_changed
