"""Open a trainer's weights, in any supported form, as tensors under checkpoint names.

::

    source = open_source(weights, checkpoint)           # a module, a TensorDict, a dict, an iterator...
    check_coverage(source.specs(), checkpoint)          # compares names, shapes and dtypes; reads no values
    source.check_values()                               # finds NaN and infinity in local shards; gathers nothing
    for name, tensor in source.tensors():               # gathers or merges one tensor at a time
        ...

Under FSDP2 every rank makes these calls; only the rank with ``source.is_sender`` sends the tensors. ``open_source`` and
``check_coverage`` are not collective, and may fail on one rank only: see :meth:`Ranks.together`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torch import nn

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.checkpoint.tensor_files import read_tensors
from torchrl_sglang.weights.source.in_memory import InMemorySource
from torchrl_sglang.weights.source.interface import WeightSource
from torchrl_sglang.weights.source.iterators import open_iterator
from torchrl_sglang.weights.source.lazy_tensors import collection_tensors, module_tensors
from torchrl_sglang.weights.source.mapping import map_to_checkpoint
from torchrl_sglang.weights.source.shards import ranks_of, reshard
from torchrl_sglang.weights.source.transformers_models import find_omitted_names, find_transformers_model

__all__ = ["open_source"]


def open_source(
    weights: Any,
    checkpoint: Checkpoint,
    *,
    name_map: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
) -> WeightSource:
    """Open a trainer's weights.

    Args:
        weights: an ``nn.Module`` (a Hugging Face model by itself or inside any wrapper: TransformersWrapper,
            TensorDictModule, torch.compile, DDP, PEFT; sharded by FSDP2), a nested TensorDict, a flat or nested dict,
            the folder of a checkpoint (safetensors), or its hub name if it is in the local Hugging Face cache,
            a function that returns a fresh iterator of ``(name, tensor)`` pairs, or such an iterator itself. Under DDP
            every rank holds all weights, so one rank alone opens and sends them.
        checkpoint: what the servers were started from.
        name_map: trainer's name to checkpoint name, for names that can't be matched.
        ignore: ``fnmatch`` patterns of names (trainer's or checkpoint's) that are not sent.

    Raises:
        ConfigError: the weights are of an unsupported kind or hold no tensor, the name map names a tensor that doesn't
            exist, or the weights hold two models that fit the checkpoint equally well.

    Examples:
        >>> import torch
        >>> checkpoint = Checkpoint.from_specs({"weight": ((2,), torch.float32)})
        >>> source = open_source({"actor.weight": torch.ones(2)}, checkpoint)
        >>> [(name, tensor.tolist()) for name, tensor in source.tensors()]
        [('weight', [1.0, 1.0])]
    """
    name_map = dict(name_map or {})
    if isinstance(weights, (str, Path)):
        weights = read_tensors(weights)
    if isinstance(weights, (TensorDictBase, Mapping)):
        tensors, module = collection_tensors(weights), None
    elif isinstance(weights, nn.Module):
        reshard(weights)
        tensors, module = module_tensors(weights), weights
    elif callable(weights) or isinstance(weights, Iterable):
        return open_iterator(weights, checkpoint, name_map=name_map, ignore=ignore)
    else:
        raise ConfigError(
            f"can't read weights from a {type(weights).__name__}: pass a module, a TensorDict, a dict, an iterator "
            "of (name, tensor) pairs or a checkpoint's folder"
        )
    if not tensors:
        raise ConfigError(
            "the weights to send hold no tensor. Pass the trained model: update_policy_weights_(model), not "
            "update_policy_weights_()"
        )
    ranks = ranks_of(part for tensor in tensors for part in tensor.parts)
    mappings = map_to_checkpoint(tensors, module, checkpoint, name_map=name_map, ignore=ignore)
    model = find_transformers_model(module)
    sent = {spec.name for mapping in mappings for spec in mapping.specs}
    return InMemorySource(
        mappings, module=model, ranks=ranks, omitted_names=find_omitted_names(model, checkpoint, sent)
    )
