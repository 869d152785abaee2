"""A source whose tensors stay readable: a module's, a TensorDict's, a dict's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from torchrl_sglang.config import nearest_name
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.checkpoint.headers import TensorSpec
from torchrl_sglang.weights.checkpoint.values import non_finite_names, refuse_values
from torchrl_sglang.weights.source.contract import WeightSource
from torchrl_sglang.weights.source.mapping import TensorMapping
from torchrl_sglang.weights.source.shards import Ranks

__all__ = ["ReadableSource"]


class ReadableSource(WeightSource):
    """Tensors that stay readable: a module's, a TensorDict's, a dict's."""

    def __init__(self, reads: Sequence[TensorMapping], *, module: nn.Module | None, ranks: Ranks | None) -> None:
        self._reads = tuple(reads)
        self._specs = {spec.name: spec for read in self._reads for spec in read.specs}
        self._read_of = {spec.name: read for read in self._reads for spec in read.specs}
        self._ranks = ranks
        self.module = module
        self.is_sender = ranks is None or ranks.is_first
        self.is_sharded = ranks is not None

    def specs(self) -> dict[str, TensorSpec]:
        """What would be sent, in the trainer's order."""
        return dict(self._specs)

    def tensors(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """TensorMapping one at a time; closed early, a sharded source goes on gathering for its other ranks' sake."""
        wanted = self._known(names)
        position = 0
        try:
            for pair in self._stream(wanted):
                position += 1
                yield pair
                del pair
        except GeneratorExit:
            # Other ranks are waiting in the next gather: leave them there and they never come back.
            if self._ranks is not None:
                for _ in self._stream(wanted[position:]):
                    pass
            raise

    def check_values(self, names: Sequence[str] | None = None, target: torch.dtype | None = None) -> None:
        """Look at what this rank holds, and hear from the others what they saw."""
        reads = list(dict.fromkeys(self._read_of[name] for name in self._known(names)))
        labels = [read.specs[0].name for read in reads]
        parts = [(str(index), part) for index, read in enumerate(reads) for live in read.inputs for part in live.parts]
        found = dict(line.split(": ", 1) for line in non_finite_names(parts, target))
        bad = {int(index): what for index, what in found.items()}
        if self._ranks is None:
            refuse_values([f"{labels[index]}: {what}" for index, what in sorted(bad.items())])
            return
        everywhere = self._ranks.any([index in bad for index in range(len(reads))])
        refuse_values(
            [f"{labels[i]}: {bad.get(i, 'on another rank')}" for i, is_bad in enumerate(everywhere) if is_bad]
        )

    def _known(self, names: Sequence[str] | None) -> list[str]:
        if names is None:
            return list(self._specs)
        for name in names:
            if name not in self._specs:
                raise ConfigError(f"the weights have no tensor {name!r}.{nearest_name(name, list(self._specs))}")
        return list(names)

    def _stream(self, wanted: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Reads in the order of ``wanted``; what a conversion made besides is held until its last name is out."""
        left: dict[TensorMapping, int] = {}
        for name in wanted:
            left[self._read_of[name]] = left.get(self._read_of[name], 0) + 1
        held: dict[TensorMapping, dict[str, torch.Tensor]] = {}
        for name in wanted:
            read = self._read_of[name]
            if read not in held:
                held[read] = read.values()
            left[read] -= 1
            results = held[read] if left[read] else held.pop(read)
            yield name, results.pop(name)
            del results
