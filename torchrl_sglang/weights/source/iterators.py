"""Weights that come from an iterator of ``(name, tensor)`` pairs.

A function that returns a fresh iterator is called more than once: first to check, then to send. So all tensors are
checked before the first byte is sent. A bare iterator can be read only once, and holding its tensors to check them
first could be a second copy of the model. So an unknown name, a wrong shape or NaN stops the update right before that
tensor, and a missing name is known only at the end. In both cases the servers hold mixed weights until a full sync
succeeds.

Names are the checkpoint's, with or without a prefix. Tensors that a checkpoint stores in another form (packed experts)
are converted only for a module, a TensorDict or a dict, where all of them are available at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from torchrl_sglang.errors import ConfigError, WeightCoverageError
from torchrl_sglang.weights.checkpoint.coverage import check_coverage, is_ignored
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.checkpoint.values import check_finite, find_non_finite, raise_if_non_finite
from torchrl_sglang.weights.source.interface import WeightSource
from torchrl_sglang.weights.source.names import without_wrappers
from torchrl_sglang.weights.source.readable import refuse_unreadable
from torchrl_sglang.weights.source.shards import full_tensor

__all__ = ["open_iterator"]

Pairs = Iterable[tuple[str, torch.Tensor]]


def open_iterator(
    weights: Callable[[], Pairs] | Pairs, checkpoint: Checkpoint, *, name_map: Mapping[str, str], ignore: Sequence[str]
) -> WeightSource:
    """Open an iterator, an iterable, or a function that returns one."""
    rename = _Renamer(checkpoint, name_map, ignore)
    if isinstance(weights, Iterator):
        return _OneShotSource(weights, rename, checkpoint, ignore)
    return _RepeatableSource(weights if callable(weights) else weights.__iter__, rename)


class _Renamer:
    """Translates pairs to checkpoint names one at a time, and skips those that are not to be sent."""

    def __init__(self, checkpoint: Checkpoint, name_map: Mapping[str, str], ignore: Sequence[str]) -> None:
        self._checkpoint, self._name_map, self._ignore = checkpoint, name_map, ignore

    def __call__(self, pairs: Pairs) -> Iterator[tuple[str, torch.Tensor]]:
        for pair in pairs:
            name, tensor = _require_pair(pair)
            del pair
            refuse_unreadable(name, tensor)
            checkpoint_name = self._name_map.get(name) or self._find_checkpoint_name(name)
            if not self._is_skipped(name, checkpoint_name):
                yield checkpoint_name, full_tensor(tensor)
            del tensor

    def _is_skipped(self, name: str, checkpoint_name: str) -> bool:
        if is_ignored(name, self._ignore) or is_ignored(checkpoint_name, self._ignore):
            return True
        return checkpoint_name not in self._checkpoint.specs and self._checkpoint.is_optional(checkpoint_name)

    def _find_checkpoint_name(self, name: str) -> str:
        """The longest tail of ``name`` that is a checkpoint name.

        Pairs come one at a time, so the most common prefix is not known.
        """
        for candidate in (name, without_wrappers(name)):
            parts = candidate.split(".")
            for start in range(len(parts)):
                if (tail := ".".join(parts[start:])) in self._checkpoint.specs:
                    return tail
        return name


class _RepeatableSource(WeightSource):
    def __init__(self, make_pairs: Callable[[], Pairs], rename: _Renamer) -> None:
        self._make_pairs, self._rename = make_pairs, rename
        self._specs: dict[str, TensorSpec] | None = None

    def specs(self) -> dict[str, TensorSpec]:
        if self._specs is None:
            self._specs = {}
            for name, tensor in self._rename(self._make_pairs()):
                if name in self._specs:
                    raise ConfigError(f"the iterator gave {name!r} twice")
                self._specs[name] = TensorSpec.of(name, tensor)
                del tensor  # before the next one is made
        return dict(self._specs)

    def tensors(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        wanted = None if names is None else set(names)
        for pair in self._rename(self._make_pairs()):
            if wanted is None or pair[0] in wanted:
                yield pair
            del pair

    def check_values(self, names: Sequence[str] | None = None, target: torch.dtype | None = None) -> None:
        """Read every tensor once, one at a time."""
        problems: dict[str, str] = {}
        for pair in self.tensors(names):
            problems |= find_non_finite([pair], target)
            del pair
        raise_if_non_finite(problems)


class _OneShotSource(WeightSource):
    one_shot = True

    def __init__(self, pairs: Iterator[Any], rename: _Renamer, checkpoint: Checkpoint, ignore: Sequence[str]) -> None:
        self._pairs: Iterator[Any] | None = pairs
        self._rename, self._checkpoint, self._ignore = rename, checkpoint, ignore
        self._target: torch.dtype | None = None
        self._check_values = False

    def specs(self) -> dict[str, TensorSpec]:
        """The checkpoint's tensors, which the iterator must give; their dtypes may differ."""
        return {name: spec for name, spec in self._checkpoint.specs.items() if not is_ignored(name, self._ignore)}

    def check_values(self, names: Sequence[str] | None = None, target: torch.dtype | None = None) -> None:
        """Check each tensor when :meth:`tensors` reads it; until then no value is known."""
        self._check_values, self._target = True, target

    def tensors(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Read the pairs in the iterator's own order.

        Raises:
            WeightCoverageError: at the first tensor that doesn't fit, or at the end if tensors are missing.
        """
        if names is not None:
            raise ConfigError("an iterator gives its tensors once and in its own order: names can't be chosen")
        if self._pairs is None:
            raise ConfigError("this iterator was already sent; pass a new one, or a function that makes one")
        pairs, self._pairs = self._pairs, None
        seen: dict[str, TensorSpec] = {}
        for name, tensor in self._rename(pairs):
            if name in seen:
                raise WeightCoverageError(f"the iterator gave {name!r} twice", mismatched=[f"{name}: came twice"])
            seen[name] = TensorSpec.of(name, tensor)
            self._check_spec(seen[name])
            if self._check_values:
                check_finite(name, tensor, self._target)
            yield name, tensor
            del tensor
        check_coverage(seen, self._checkpoint, ignore=self._ignore)

    def _check_spec(self, spec: TensorSpec) -> None:
        """Refuse an unknown name or a wrong shape at once; dtypes are compared at the end."""
        stored = self._checkpoint.specs.get(spec.name)
        if stored is None or stored.shape != spec.shape:
            other_names = [name for name in self._checkpoint.specs if name != spec.name]
            check_coverage([spec], self._checkpoint, ignore=other_names)


def _require_pair(pair: Any) -> tuple[str, torch.Tensor]:
    if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], torch.Tensor):
        return pair
    raise ConfigError(f"an iterator of weights must give (name, tensor) pairs, got {type(pair).__name__}")
