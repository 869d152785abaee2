"""Weights in the trainer's memory, which can be read more than once: a module's, a TensorDict's or a dict's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from torchrl_sglang.config import nearest_name
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.checkpoint.values import find_non_finite, raise_if_non_finite
from torchrl_sglang.weights.source.interface import WeightSource
from torchrl_sglang.weights.source.mapping import TensorMapping
from torchrl_sglang.weights.source.shards import Ranks, together

__all__ = ["InMemorySource"]


class InMemorySource(WeightSource):
    """Source for a module, a TensorDict or a dict; its tensors can be read any number of times and in any order.

    Args:
        mappings: from :func:`~torchrl_sglang.weights.source.mapping.map_to_checkpoint`.
        module: the trainer's transformers model, if there is exactly one.
        ranks: the ranks that share the tensors' shards; ``None`` if nothing is sharded.
        omitted_names: see :class:`WeightSource`.
    """

    def __init__(
        self,
        mappings: Sequence[TensorMapping],
        *,
        module: nn.Module | None,
        ranks: Ranks | None,
        omitted_names: tuple[str, ...] = (),
    ) -> None:
        self._specs = {spec.name: spec for mapping in mappings for spec in mapping.specs}
        self._mapping_of = {spec.name: mapping for mapping in mappings for spec in mapping.specs}
        self.ranks = ranks
        self.module = module
        self.omitted_names = omitted_names
        self.is_sender = ranks is None or ranks.is_first

    def specs(self) -> dict[str, TensorSpec]:
        """The tensors to be sent, in the trainer's order."""
        return dict(self._specs)

    def tensors(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Read tensors one at a time.

        If the iterator is closed early, a sharded source gathers the remaining tensors nevertheless: the other ranks
        would wait for ever in the next gather.
        """
        names = self._require_known(names)
        position = 0
        try:
            for pair in self._read(names):
                position += 1
                yield pair
                del pair
        except GeneratorExit:
            if self.ranks is not None:
                for _ in self._read(names[position:]):
                    pass
            raise

    def check_values(self, names: Sequence[str] | None = None, target: torch.dtype | None = None) -> None:
        """Check this rank's shards, then exchange the results with the other ranks."""
        mappings = list(dict.fromkeys(self._mapping_of[name] for name in self._require_known(names)))
        labels = [mapping.specs[0].name for mapping in mappings]
        parts = (
            (label, part)
            for label, mapping in zip(labels, mappings, strict=True)
            for tensor in mapping.inputs
            for part in tensor.local_parts
        )
        with together(self.ranks, "checking the values of its tensors"):
            problems = find_non_finite(parts, target)
        if self.ranks is not None:
            is_bad = self.ranks.any([label in problems for label in labels])
            problems = {
                label: problems.get(label, "on another rank") for label, bad in zip(labels, is_bad, strict=True) if bad
            }
        raise_if_non_finite(problems)

    def _require_known(self, names: Sequence[str] | None) -> list[str]:
        if names is None:
            return list(self._specs)
        for name in names:
            if name not in self._specs:
                raise ConfigError(f"the weights have no tensor {name!r}.{nearest_name(name, list(self._specs))}")
        return list(names)

    def _read(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Read in the order of ``names``.

        Computes a mapping once, and holds its outputs until those among ``names`` are read.
        """
        remaining = Counter(self._mapping_of[name] for name in names)
        computed: dict[TensorMapping, dict[str, torch.Tensor]] = {}
        for name in names:
            mapping = self._mapping_of[name]
            if mapping not in computed:
                computed[mapping] = mapping.values()
            remaining[mapping] -= 1
            outputs = computed[mapping] if remaining[mapping] else computed.pop(mapping)
            yield name, outputs.pop(name)
            del outputs
