"""Weights that come as an iterator: checked one by one as they pass, complete only when the last has passed.

A function that makes a fresh iterator is run more than once: to look, then to send, so everything is refused before
the first byte. A bare iterator can be run only once, and keeping its tensors to look at them first might be a second
copy of the model. So an unknown name, a wrong shape or NaN stops the update before that tensor is sent, and a missing
name is known at the end: either way the servers hold mixed weights until a good sync.

Names are the checkpoint's, with or without a prefix. Tensors that a checkpoint holds in another form (packed experts)
come from a module, a TensorDict or a dict, where all of them are there to be converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from torchrl_sglang.errors import ConfigError, WeightCoverageError
from torchrl_sglang.weights.checkpoint.coverage import check_coverage, is_ignored
from torchrl_sglang.weights.checkpoint.headers import Checkpoint, TensorSpec
from torchrl_sglang.weights.checkpoint.values import check_finite, non_finite_names, refuse_values
from torchrl_sglang.weights.source.contract import WeightSource
from torchrl_sglang.weights.source.lazy_tensors import full_tensor
from torchrl_sglang.weights.source.names import without_wrappers

__all__ = ["open_stream"]

Pairs = Iterable[tuple[str, torch.Tensor]]


def open_stream(
    weights: Callable[[], Pairs] | Pairs, checkpoint: Checkpoint, *, name_map: Mapping[str, str], ignore: Sequence[str]
) -> WeightSource:
    """A source for an iterator, an iterable, or a function that returns one."""
    if isinstance(weights, Iterator):
        return _OneShotSource(weights, checkpoint, name_map, ignore)
    make = weights if callable(weights) else weights.__iter__
    return _RepeatableSource(make, checkpoint, name_map, ignore)


class _Renamer:
    def __init__(self, checkpoint: Checkpoint, name_map: Mapping[str, str], ignore: Sequence[str]) -> None:
        self._checkpoint, self._name_map, self._ignore = checkpoint, name_map, ignore

    def __call__(self, pairs: Pairs) -> Iterator[tuple[str, torch.Tensor]]:
        for pair in pairs:
            name, tensor = _as_pair(pair)
            del pair
            final = self._name_map.get(name) or self._in_checkpoint(name)
            skip = is_ignored(name, self._ignore) or is_ignored(final, self._ignore)
            if skip or (final not in self._checkpoint.specs and self._checkpoint.optional(final)):
                continue
            yield final, full_tensor(tensor)
            del tensor

    def _in_checkpoint(self, name: str) -> str:
        """The longest tail the checkpoint knows; one pair at a time, there is no majority to find a prefix by."""
        for candidate in (name, without_wrappers(name)):
            parts = candidate.split(".")
            for cut in range(len(parts)):
                if (tail := ".".join(parts[cut:])) in self._checkpoint.specs:
                    return tail
        return name


class _RepeatableSource(WeightSource):
    def __init__(
        self, make: Callable[[], Pairs], checkpoint: Checkpoint, name_map: Mapping[str, str], ignore: Sequence[str]
    ) -> None:
        self._make, self._rename = make, _Renamer(checkpoint, name_map, ignore)
        self._specs: dict[str, TensorSpec] | None = None

    def specs(self) -> dict[str, TensorSpec]:
        if self._specs is None:
            self._specs = {}
            for name, tensor in self._rename(self._make()):
                if name in self._specs:
                    raise ConfigError(f"the iterator gave {name!r} twice")
                self._specs[name] = TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
                del tensor  # before the next one is made
        return dict(self._specs)

    def tensors(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        wanted = None if names is None else set(names)
        for pair in self._rename(self._make()):
            if wanted is None or pair[0] in wanted:
                yield pair
            del pair

    def check_values(self, names: Sequence[str] | None = None, target: torch.dtype | None = None) -> None:
        """TensorMapping every tensor once, one at a time."""
        lines: list[str] = []
        for pair in self.tensors(names):
            lines += non_finite_names([pair], target)
            del pair
        refuse_values(lines)


class _OneShotSource(WeightSource):
    one_shot = True

    def __init__(
        self, pairs: Iterator[Any], checkpoint: Checkpoint, name_map: Mapping[str, str], ignore: Sequence[str]
    ) -> None:
        self._pairs: Iterator[Any] | None = pairs
        self._checkpoint, self._ignore = checkpoint, ignore
        self._rename = _Renamer(checkpoint, name_map, ignore)
        self._target: torch.dtype | None = None
        self._check_values = False

    def specs(self) -> dict[str, TensorSpec]:
        """What has to come: the checkpoint's own tensors (their dtypes may differ when they come)."""
        return {name: spec for name, spec in self._checkpoint.specs.items() if not is_ignored(name, self._ignore)}

    def check_values(self, names: Sequence[str] | None = None, target: torch.dtype | None = None) -> None:
        """Nothing can be looked at yet: from now on each tensor is checked before it is handed out."""
        self._check_values, self._target = True, target

    def tensors(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The pairs in the iterator's own order.

        Raises:
            WeightCoverageError: at the first tensor that doesn't fit, or at the end for those that didn't come.
        """
        if names is not None:
            raise ConfigError("an iterator gives its tensors once and in its own order: names can't be chosen")
        if self._pairs is None:
            raise ConfigError("this iterator was already sent; pass a new one, or a function that makes one")
        pairs, self._pairs = self._pairs, None
        seen: dict[str, TensorSpec] = {}
        for name, tensor in self._rename(pairs):
            self._check(name, tensor, seen)
            seen[name] = TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
            yield name, tensor
            del tensor
        check_coverage(seen, self._checkpoint, ignore=self._ignore)

    def _check(self, name: str, tensor: torch.Tensor, seen: Mapping[str, TensorSpec]) -> None:
        spec = TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
        only_this = [n for n in self._checkpoint.specs if n != name]
        if name in seen:
            raise WeightCoverageError(f"the iterator gave {name!r} twice", mismatched=[f"{name}: came twice"])
        if name not in self._checkpoint.specs or spec.shape != self._checkpoint.specs[name].shape:
            check_coverage([spec], self._checkpoint, ignore=only_this)
        if self._check_values:
            check_finite(name, tensor, self._target)


def _as_pair(pair: Any) -> tuple[str, torch.Tensor]:
    if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], torch.Tensor):
        return pair
    raise ConfigError(f"an iterator of weights must give (name, tensor) pairs, got {type(pair).__name__}")
