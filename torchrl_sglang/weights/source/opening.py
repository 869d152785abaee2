"""Whatever a trainer has, as tensors under checkpoint names, read one at a time.

::

    source = open_source(weights, checkpoint)           # a module, a TensorDict, a dict, an iterator...
    check_coverage(source.specs(), checkpoint)          # names, shapes, dtypes: nothing is read for it
    source.check_values()                               # NaN, infinity: local shards only, nothing is gathered
    for name, tensor in source.tensors():               # gathered or merged here, and only while held
        ...

Under FSDP2 every rank runs exactly this; only the rank with ``source.is_sender`` sends what it gets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensordict import TensorDictBase
from torch import nn
from torch.distributed.fsdp import FSDPModule

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.source.contract import WeightSource
from torchrl_sglang.weights.source.iterators import open_stream
from torchrl_sglang.weights.source.lazy_tensors import list_mapping, list_module
from torchrl_sglang.weights.source.mapping import callable_model, left_out_by_design, map_to_checkpoint
from torchrl_sglang.weights.source.readable import ReadableSource
from torchrl_sglang.weights.source.shards import ranks_of

__all__ = ["WeightSource", "open_source"]


def open_source(
    weights: Any,
    checkpoint: Checkpoint,
    *,
    name_map: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
) -> WeightSource:
    """Understand a trainer's weights.

    Args:
        weights: an ``nn.Module`` (a Hugging Face model by itself or inside any wrapper: TransformersWrapper,
            TensorDictModule, torch.compile, DDP, PEFT; sharded by FSDP2), a nested TensorDict, a flat or nested dict,
            a function that returns a fresh iterator of ``(name, tensor)`` pairs, or such an iterator itself. DDP's
            ranks all hold everything, so there one rank opens and sends by itself.
        checkpoint: what the servers were started from.
        name_map: trainer's name to checkpoint name, for names that can't be matched.
        ignore: ``fnmatch`` patterns of names (trainer's or checkpoint's) that are not sent.

    Raises:
        ConfigError: weights of a kind nobody can read, an empty collection, a name map that names nothing, or two
            models where one was expected.

    Examples:
        >>> import torch
        >>> checkpoint = Checkpoint.from_specs({"weight": ((2,), torch.float32)})
        >>> source = open_source({"actor.weight": torch.ones(2)}, checkpoint)
        >>> [(name, tensor.tolist()) for name, tensor in source.tensors()]
        [('weight', [1.0, 1.0])]
    """
    name_map = dict(name_map or {})
    if isinstance(weights, (TensorDictBase, Mapping)):
        live, module = list_mapping(weights), None
    elif isinstance(weights, nn.Module):
        for part in weights.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # a root left whole by a forward pass would be read without its ranks
        live, module = list_module(weights), weights
    elif callable(weights) or isinstance(weights, Iterable):
        return open_stream(weights, checkpoint, name_map=name_map, ignore=tuple(ignore))
    else:
        raise ConfigError(
            f"can't read weights from a {type(weights).__name__}: pass a module, a TensorDict, a dict or an iterator "
            "of (name, tensor) pairs"
        )
    if not live:
        raise ConfigError(
            "the weights to send hold no tensor. Pass the trained model: update_policy_weights_(model), not "
            "update_policy_weights_()"
        )
    ranks = ranks_of(tensor for t in live for tensor in t.tensors)
    reads = map_to_checkpoint(live, module, checkpoint, name_map=name_map, ignore=tuple(ignore), ranks=ranks)
    source = ReadableSource(reads, module=callable_model(module), ranks=ranks)
    source.not_held = left_out_by_design(source.module, checkpoint, source.specs())
    return source
