"""Map the trainer's tensors to the checkpoint's.

In order of precedence: the user's name map; equal names; names behind a common prefix; transformers' save-time
conversion. The result of each is compared with the names and shapes of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from torchrl_sglang.errors import ConfigError, WeightCoverageError
from torchrl_sglang.weights.checkpoint.coverage import is_ignored
from torchrl_sglang.weights.checkpoint.headers import Checkpoint, is_output_embedding
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.source.conversion import ConversionGroup, convert, plan_conversion
from torchrl_sglang.weights.source.lazy_tensors import LazyTensor
from torchrl_sglang.weights.source.names import resolve_names, without_wrappers
from torchrl_sglang.weights.source.transformers_models import model_from_config, transformers_models

__all__ = ["TensorMapping", "map_to_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorMapping:
    """Some of the trainer's tensors, and the checkpoint tensors made from them.

    Attributes:
        inputs: the trainer's tensors.
        specs: the checkpoint tensors.
        transform: computes the checkpoint tensors, by name, from the values of :attr:`inputs`; ``None`` if there is
            one tensor on each side and only its name differs.
    """

    inputs: tuple[LazyTensor, ...]
    specs: tuple[TensorSpec, ...]
    transform: Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]] | None = None

    @classmethod
    def renaming(cls, tensor: LazyTensor, checkpoint_name: str) -> TensorMapping:
        """One tensor under its checkpoint name."""
        return cls(inputs=(tensor,), specs=(tensor.spec(checkpoint_name),))

    def values(self) -> dict[str, torch.Tensor]:
        """Read the inputs and compute the checkpoint tensors, by name; collective if an input is sharded."""
        if self.transform is None:
            return {self.specs[0].name: self.inputs[0].read()}
        return self.transform([tensor.read() for tensor in self.inputs])

    @property
    def is_buffer(self) -> bool:
        """Whether all inputs are buffers."""
        return all(tensor.is_buffer for tensor in self.inputs)


def map_to_checkpoint(
    tensors: Sequence[LazyTensor],
    module: nn.Module | None,
    checkpoint: Checkpoint,
    *,
    name_map: Mapping[str, str],
    ignore: Sequence[str],
) -> list[TensorMapping]:
    """Find the checkpoint name of each tensor.

    A tensor that matches nothing is mapped to its own name, so that the coverage check refuses it by that name.

    Args:
        tensors: all of the trainer's tensors.
        module: the module they belong to, if they came as one.
        checkpoint: what the servers were started from.
        name_map: trainer's name to checkpoint name.
        ignore: ``fnmatch`` patterns of names (trainer's or checkpoint's) that are not mapped.

    Raises:
        ConfigError: the name map names tensors that don't exist, or two tensors map to the same name.
        WeightCoverageError: the checkpoint ties the output embedding to the input embedding, and the trainer's two
            have different values. If they are sharded, only a rank whose shards differ raises it.
    """
    tensors = [t for t in tensors if not (is_ignored(t.name, ignore) or is_ignored(without_wrappers(t.name), ignore))]
    models = transformers_models(module) if module is not None else {}
    path, model = next(iter(models.items())) if len(models) == 1 else ("", None)
    names = {t: _name_in_model(t.name, path) if model is not None else t.name for t in tensors}
    renamed = _apply_name_map(names, name_map)
    names = {tensor: name for tensor, name in names.items() if tensor not in renamed}
    mappings = _map_by_name(names, checkpoint)
    if _has_unmatched(mappings, checkpoint):
        if model is None and (model := model_from_config(checkpoint.config)) is not None:
            names = _match_model_names(names, model)
        converted = _map_by_conversion(names, model, checkpoint) if model is not None else None
        if converted is not None and _count_matches(converted, checkpoint) > _count_matches(mappings, checkpoint):
            mappings = converted
    mappings += [TensorMapping.renaming(tensor, name) for tensor, name in renamed.items()]
    mappings = [mapping for mapping in mappings if not all(is_ignored(spec.name, ignore) for spec in mapping.specs)]
    buffers = {name for name, _ in model.named_buffers()} if model is not None else set()
    return _drop_duplicates(_drop_redundant(mappings, checkpoint, buffers))


def _name_in_model(name: str, path: str) -> str:
    """The name inside the transformers model at ``path``; names outside the model keep their path."""
    return without_wrappers(name[len(path) :]) if name.startswith(path) else name


def _apply_name_map(names: Mapping[LazyTensor, str], name_map: Mapping[str, str]) -> dict[LazyTensor, str]:
    renamed = {}
    unused = set(name_map)
    for tensor, name in names.items():
        key = next((key for key in (tensor.name, name, without_wrappers(tensor.name)) if key in name_map), None)
        if key is not None:
            renamed[tensor] = name_map[key]
            unused.discard(key)
    if unused:
        raise ConfigError(f"name_map names tensors that the weights don't have: {', '.join(sorted(unused)[:10])}")
    return renamed


def _map_by_name(names: Mapping[LazyTensor, str], checkpoint: Checkpoint) -> list[TensorMapping]:
    resolved = resolve_names(names.values(), checkpoint.specs)
    return [TensorMapping.renaming(tensor, resolved[name]) for tensor, name in names.items()]


def _match_model_names(names: Mapping[LazyTensor, str], model: nn.Module) -> dict[LazyTensor, str]:
    """Translate the trainer's names into those of ``model``, built from the checkpoint's config."""
    model_names = {
        name for named in (model.named_parameters, model.named_buffers) for name, _ in named(remove_duplicate=False)
    }
    resolved = resolve_names(names.values(), model_names)
    return {tensor: resolved[name] for tensor, name in names.items()}


def _map_by_conversion(
    names: Mapping[LazyTensor, str], model: nn.Module, checkpoint: Checkpoint
) -> list[TensorMapping] | None:
    by_name: dict[str, LazyTensor] = {}
    for tensor, name in names.items():
        by_name.setdefault(name, tensor)
    groups = plan_conversion(model, {name: (tensor.shape, tensor.dtype) for name, tensor in by_name.items()})
    if groups is None:
        return None
    resolved = resolve_names([name for group in groups for name in group.outputs], checkpoint.specs)
    return [_conversion_mapping(model, group, by_name, resolved) for group in groups]


def _conversion_mapping(
    model: nn.Module, group: ConversionGroup, by_name: Mapping[str, LazyTensor], resolved: Mapping[str, str]
) -> TensorMapping:
    inputs = tuple(by_name[name] for name in group.sources)
    trainable = any(tensor.trainable for tensor in inputs)
    specs = tuple(
        TensorSpec(name=resolved[name], shape=shape, dtype=dtype, trainable=trainable)
        for name, (shape, dtype) in group.outputs.items()
    )

    def transform(values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = convert(model, group, dict(zip(group.sources, values, strict=True)))
        return {resolved[name]: tensor for name, tensor in outputs.items()}

    return TensorMapping(inputs=inputs, specs=specs, transform=None if group.renames else transform)


def _matches(spec: TensorSpec, checkpoint: Checkpoint) -> bool:
    stored = checkpoint.specs.get(spec.name)
    return stored is not None and stored.shape == spec.shape


def _count_matches(mappings: Sequence[TensorMapping], checkpoint: Checkpoint) -> int:
    return len({spec.name for mapping in mappings for spec in mapping.specs if _matches(spec, checkpoint)})


def _has_unmatched(renamings: Sequence[TensorMapping], checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint lacks a tensor that it should have: no buffer, no tied tensor, no computed table."""
    matched_memory = {r.inputs[0].memory for r in renamings if _matches(r.specs[0], checkpoint)}
    return any(
        not _matches(r.specs[0], checkpoint)
        and not r.is_buffer
        and r.inputs[0].memory not in matched_memory
        and not checkpoint.is_optional(r.specs[0].name)
        for r in renamings
    )


def _drop_redundant(
    mappings: Sequence[TensorMapping], checkpoint: Checkpoint, buffers: set[str]
) -> list[TensorMapping]:
    """Drop tensors that the checkpoint need not have.

    These are buffers, tables that servers compute, second names of a tensor that is sent, and a tied output embedding.
    """
    sent_memory = {
        mapping.inputs[0].memory
        for mapping in mappings
        if len(mapping.inputs) == 1 and mapping.specs[0].name in checkpoint.specs
    }
    kept = []
    for mapping in mappings:
        if len(mapping.specs) == 1 and (name := mapping.specs[0].name) not in checkpoint.specs:
            if mapping.is_buffer or name in buffers or checkpoint.is_server_computed(name):
                continue
            if len(mapping.inputs) == 1 and mapping.inputs[0].memory in sent_memory:
                continue
            if checkpoint.tied and is_output_embedding(name):
                _require_tied(mapping, mappings, checkpoint)
                continue
        kept.append(mapping)
    return kept


def _require_tied(output: TensorMapping, mappings: Sequence[TensorMapping], checkpoint: Checkpoint) -> None:
    """Refuse an output embedding whose values differ from the input embedding's; of a sharded one, on this rank."""
    name, tensor = output.specs[0].name, output.inputs[0]
    candidates = [
        other.inputs[0]
        for other in mappings
        if other is not output
        and len(other.inputs) == 1
        and other.specs[0].shape == tensor.shape
        and _matches(other.specs[0], checkpoint)
    ]
    is_equal = len(candidates) == 1 and _have_equal_values(tensor, candidates[0])
    if not is_equal:
        raise WeightCoverageError(
            f"the served checkpoint ties {name} to its input embedding, but the trainer's {tensor.name} is a separate "
            "tensor with other values, and the server has room for one of them only. Tie the trainer's weights "
            "(model.tie_weights()), serve an untied checkpoint, or leave it out on purpose with SyncConfig.ignore.",
            unknown=[name],
        )


def _have_equal_values(one: LazyTensor, other: LazyTensor) -> bool:
    """Compare this rank's shards."""
    return len(one.parts) == len(other.parts) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
        for a, b in zip(one.local_parts, other.local_parts, strict=True)
    )


def _drop_duplicates(mappings: Sequence[TensorMapping]) -> list[TensorMapping]:
    """Drop a mapping to a name that already has one, if both read the same memory; refuse it otherwise."""
    mapping_of: dict[str, TensorMapping] = {}
    kept = []
    for mapping in mappings:
        earlier = next((mapping_of[spec.name] for spec in mapping.specs if spec.name in mapping_of), None)
        if earlier is not None:
            first, second = earlier.inputs[0], mapping.inputs[0]
            if len(earlier.inputs) == len(mapping.inputs) == 1 and first.memory == second.memory:
                continue
            raise ConfigError(
                f"{first.name!r} and {second.name!r} both map to {mapping.specs[0].name!r}: which one to send would "
                "be a guess. Pass the one model, or leave one out with SyncConfig.ignore."
            )
        mapping_of.update({spec.name: mapping for spec in mapping.specs})
        kept.append(mapping)
    return kept
