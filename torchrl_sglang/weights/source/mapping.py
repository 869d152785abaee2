"""From the trainer's tensors to the checkpoint's: which is which, which come together, which stay at home.

Order of trust: the user's name map; names as they are; names behind a common prefix; transformers' own save-time
conversion. Each is tried against the names and shapes the checkpoint is known to have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from torchrl_sglang.errors import ConfigError, WeightCoverageError
from torchrl_sglang.weights.checkpoint.coverage import is_ignored
from torchrl_sglang.weights.checkpoint.headers import Checkpoint, TensorSpec, is_output_embedding
from torchrl_sglang.weights.source.conversion import (
    ConversionGroup,
    convert,
    is_transformers_model,
    model_from_config,
    names_left_out,
    plan_conversion,
)
from torchrl_sglang.weights.source.lazy_tensors import LazyTensor
from torchrl_sglang.weights.source.names import resolve_names, without_wrappers
from torchrl_sglang.weights.source.shards import Ranks

__all__ = ["TensorMapping", "callable_model", "left_out_by_design", "map_to_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorMapping:
    """One step of reading: these live tensors become those checkpoint tensors.

    Attributes:
        inputs: the trainer's tensors that are read.
        specs: the checkpoint tensors they give.
        transform: makes the one of the other, by name; ``None`` if it is one tensor under another name.
    """

    inputs: tuple[LazyTensor, ...]
    specs: tuple[TensorSpec, ...]
    transform: Callable[[dict[LazyTensor, torch.Tensor]], dict[str, torch.Tensor]] | None = None

    def values(self) -> dict[str, torch.Tensor]:
        """TensorMapping, by checkpoint name; collective if anything is sharded."""
        if self.transform is None:
            return {self.specs[0].name: self.inputs[0].read()}
        return self.transform({live: live.read() for live in self.inputs})

    @property
    def is_buffer(self) -> bool:
        """Made of buffers only."""
        return all(live.is_buffer for live in self.inputs)


def callable_model(module: nn.Module | None) -> nn.Module | None:
    """The transformers model inside ``module``, if there is exactly one."""
    roots = _transformers_roots(module) if module is not None else {}
    return next(iter(roots.values())) if len(roots) == 1 else None


def left_out_by_design(
    module: nn.Module | None, checkpoint: Checkpoint, sent: Mapping[str, TensorSpec]
) -> tuple[str, ...]:
    """Names of the checkpoint that are not sent because the model's class doesn't load them either."""
    absent = [name for name in checkpoint.specs if name not in sent and not checkpoint.optional(name)]
    if not absent:
        return ()
    model = module if module is not None else model_from_config(checkpoint.config)
    return tuple(names_left_out(model, absent)) if model is not None else ()


def map_to_checkpoint(
    live: Sequence[LazyTensor],
    module: nn.Module | None,
    checkpoint: Checkpoint,
    *,
    name_map: Mapping[str, str],
    ignore: Sequence[str],
    ranks: Ranks | None = None,
) -> list[TensorMapping]:
    """Find each tensor's checkpoint name.

    What nothing explains is kept under its own name, for the coverage check to refuse.

    Raises:
        ConfigError: the name map names tensors that don't exist, or two tensors want the same name.
        WeightCoverageError: an output embedding that left the input embedding it is tied to in the checkpoint.
    """
    live = [t for t in live if not (is_ignored(t.name, ignore) or is_ignored(without_wrappers(t.name), ignore))]
    roots = _transformers_roots(module) if module is not None else {}
    root_path, root = next(iter(roots.items())) if len(roots) == 1 else ("", None)
    own = _names_in_model(live, root_path) if root is not None else {t: t.name for t in live}
    mapped = _apply_name_map(own, name_map)
    free = {t: name for t, name in own.items() if t not in mapped}
    reads = _direct(free, checkpoint)
    model = root
    if _unexplained(reads, checkpoint):
        model = root if root is not None else model_from_config(checkpoint.config)
        converted = _converted(free, model, checkpoint, by_root=root is not None) if model is not None else None
        if converted is not None and _score(converted, checkpoint) > _score(reads, checkpoint):
            reads = converted
    reads += [TensorMapping(inputs=(t,), specs=(_spec(t, name),)) for t, name in mapped.items()]
    reads = [read for read in reads if not all(is_ignored(spec.name, ignore) for spec in read.specs)]
    buffers = {name for name, _ in model.named_buffers()} if model is not None else set()
    return _one_each(_without_extras(reads, checkpoint, buffers, ranks))


def _transformers_roots(module: nn.Module) -> dict[str, nn.Module]:
    """Outermost transformers models by path (empty, or ending in a dot)."""
    roots: dict[str, nn.Module] = {}
    for path, part in module.named_modules():
        prefix = path + "." if path else ""
        if is_transformers_model(part) and not any(prefix.startswith(root) for root in roots):
            roots[prefix] = part
    return roots


def _names_in_model(live: Sequence[LazyTensor], root_path: str) -> dict[LazyTensor, str]:
    return {t: without_wrappers(t.name[len(root_path) :]) if t.name.startswith(root_path) else t.name for t in live}


def _apply_name_map(own: Mapping[LazyTensor, str], name_map: Mapping[str, str]) -> dict[LazyTensor, str]:
    mapped = {}
    unused = set(name_map)
    for t, name in own.items():
        key = next((key for key in (t.name, name, without_wrappers(t.name)) if key in name_map), None)
        if key is not None:
            mapped[t] = name_map[key]
            unused.discard(key)
    if unused:
        raise ConfigError(f"name_map names tensors that the weights don't have: {', '.join(sorted(unused)[:10])}")
    return mapped


def _direct(own: Mapping[LazyTensor, str], checkpoint: Checkpoint) -> list[TensorMapping]:
    resolved = resolve_names(own.values(), checkpoint.specs)
    return [TensorMapping(inputs=(t,), specs=(_spec(t, resolved[name]),)) for t, name in own.items()]


def _converted(
    own: Mapping[LazyTensor, str], model: nn.Module, checkpoint: Checkpoint, *, by_root: bool
) -> list[TensorMapping] | None:
    names = dict(own)
    if not by_root:
        in_model = resolve_names(own.values(), {name for name, _ in _named_tensors(model)})
        names = {t: in_model[name] for t, name in own.items()}
    by_name: dict[str, LazyTensor] = {}
    for t, name in names.items():
        by_name.setdefault(name, t)
    plan = plan_conversion(model, {name: (t.shape, t.dtype) for name, t in by_name.items()})
    if plan is None:
        return None
    final = resolve_names([name for group in plan for name in group.outputs], checkpoint.specs)
    return [_conversion_read(model, group, by_name, final) for group in plan]


def _conversion_read(
    model: nn.Module, group: ConversionGroup, by_name: Mapping[str, LazyTensor], final: Mapping[str, str]
) -> TensorMapping:
    inputs = tuple(by_name[name] for name in group.sources)
    trainable = any(t.trainable for t in inputs)
    specs = tuple(
        TensorSpec(name=final[name], shape=shape, dtype=dtype, trainable=trainable)
        for name, (shape, dtype) in group.outputs.items()
    )

    def transform(values: dict[LazyTensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        sources = {name: values[t] for name, t in zip(group.sources, inputs, strict=True)}
        return {final[name]: tensor for name, tensor in convert(model, group, sources).items()}

    return TensorMapping(inputs=inputs, specs=specs, transform=None if group.renames else transform)


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _spec(live: LazyTensor, name: str) -> TensorSpec:
    return TensorSpec(name=name, shape=live.shape, dtype=live.dtype, trainable=live.trainable)


def _fits(spec: TensorSpec, checkpoint: Checkpoint) -> bool:
    stored = checkpoint.specs.get(spec.name)
    return stored is not None and stored.shape == spec.shape


def _score(reads: Sequence[TensorMapping], checkpoint: Checkpoint) -> int:
    return len({spec.name for read in reads for spec in read.specs if _fits(spec, checkpoint)})


def _unexplained(reads: Sequence[TensorMapping], checkpoint: Checkpoint) -> bool:
    known_memory = {read.inputs[0].memory for read in reads if _fits(read.specs[0], checkpoint)}
    return any(
        not _fits(read.specs[0], checkpoint)
        and not read.is_buffer
        and read.inputs[0].memory not in known_memory
        and not checkpoint.optional(read.specs[0].name)
        for read in reads
    )


def _without_extras(
    reads: Sequence[TensorMapping], checkpoint: Checkpoint, buffers: set[str], ranks: Ranks | None
) -> list[TensorMapping]:
    """Leave out what the checkpoint holds under another name or not at all, if that is as it should be."""
    memory = {
        read.inputs[0].memory for read in reads if len(read.inputs) == 1 and read.specs[0].name in checkpoint.specs
    }
    kept = []
    for read in reads:
        if len(read.specs) == 1 and (name := read.specs[0].name) not in checkpoint.specs:
            if read.is_buffer or name in buffers or checkpoint.computes(name):
                continue
            if len(read.inputs) == 1 and read.inputs[0].memory in memory:
                continue
            if checkpoint.tied and is_output_embedding(name):
                _require_still_tied(read, reads, checkpoint, ranks)
                continue
        kept.append(read)
    return kept


def _require_still_tied(
    read: TensorMapping, reads: Sequence[TensorMapping], checkpoint: Checkpoint, ranks: Ranks | None
) -> None:
    """A copy of the input embedding may be left out only as long as it is one."""
    name, live = read.specs[0].name, read.inputs[0]
    twins = [
        other.inputs[0]
        for other in reads
        if other is not read
        and len(other.inputs) == 1
        and other.specs[0].shape == live.shape
        and _fits(other.specs[0], checkpoint)
    ]
    same = len(twins) == 1 and _same_parts(live, twins[0])
    if ranks is not None:
        same = not ranks.any([not same])[0]
    if not same:
        raise WeightCoverageError(
            f"the served checkpoint ties {name} to its input embedding, but the trainer's {live.name} is a tensor of "
            "its own with other values: the server can't hold both. Tie the trainer's weights "
            "(model.tie_weights()), serve an untied checkpoint, or leave it out on purpose with SyncConfig.ignore.",
            unknown=[name],
        )


def _same_parts(one: LazyTensor, other: LazyTensor) -> bool:
    return len(one.parts) == len(other.parts) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
        for a, b in zip(one.parts, other.parts, strict=True)
    )


def _one_each(reads: Sequence[TensorMapping]) -> list[TensorMapping]:
    """No name twice: the same memory again is left out, anything else is refused."""
    seen: dict[str, TensorMapping] = {}
    kept = []
    for read in reads:
        rivals = [seen[spec.name] for spec in read.specs if spec.name in seen]
        if rivals:
            first = rivals[0]
            if len(read.inputs) == len(first.inputs) == 1 and read.inputs[0].memory == first.inputs[0].memory:
                continue
            raise ConfigError(
                f"{first.inputs[0].name!r} and {read.inputs[0].name!r} both stand for {read.specs[0].name!r}: which "
                "one to send would be a guess. Pass the one model, or leave one out with SyncConfig.ignore."
            )
        seen.update({spec.name: read for spec in read.specs})
        kept.append(read)
    return kept
