"""Checks that an adapter fits the servers' model: layer sizes, and the weights below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.checkpoint.rows import read_rows
from torchrl_sglang.weights.source.adapter_features import changes_base_weights

__all__ = ["check_base_model", "check_layer_sizes"]

_ROUNDINGS = 4
"""How many roundings of the coarsest dtype involved may lie between a trainer's weight and the servers'."""


def check_layer_sizes(tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Check an adapter's sizes against the buffers that SGLang makes from the checkpoint's ``config.json``.

    A tensor that does not fit is accepted by the server, and ends it at the adapter's first request.

    Args:
        tensors: ``...lora_A.weight`` and ``...lora_B.weight`` by name, complete stacks.
        checkpoint: what the servers were started from.

    Raises:
        ConfigError: naming the first module that does not fit.
    """
    config = checkpoint.config.get("text_config") or checkpoint.config
    layers = config.get("num_hidden_layers")
    if checkpoint.has_experts:
        expert = next((name for name in tensors if ".mlp." in name), None)
        if expert is not None:
            raise ConfigError(
                f"the adapter is on {_module(expert)}, and this model has experts: transport='lora' adapts the "
                "attention of such models only; transport='broadcast' sends the merged model"
            )
    for prefix, expected in _expected_sizes(config).items():
        for name in tensors:
            if not name.endswith(f".{prefix}.lora_B.weight"):
                continue
            sizes = tensors[name.replace("lora_B", "lora_A")].shape[1], tensors[name].shape[0]
            if sizes != expected:
                raise ConfigError(
                    f"the adapter is for a {_module(name)} with {sizes[0]} inputs and {sizes[1]} outputs; the servers' "
                    f"model has {expected[0]} and {expected[1]}: start trainer and servers from the same checkpoint"
                )
    for name in tensors:
        layer = int(name.partition(".layers.")[2].partition(".")[0])
        if layers is not None and layer >= layers:
            raise ConfigError(f"the adapter is on {_module(name)}, and the servers' model has {layers} layers")


def check_base_model(model: Any, checkpoint: Checkpoint, served_dtype: torch.dtype | None) -> None:
    """Check that the weights below the adapter are those of the servers' checkpoint, by one row of each.

    Args:
        model: a PEFT model, or a transformers model with PEFT adapters.
        checkpoint: what the servers were started from. Without its files only shapes are compared.
        served_dtype: what the servers compute in; ``None`` if unknown.

    Raises:
        ConfigError: an initialisation, a merged adapter or training has changed them; or the embedding was resized.
    """
    base = dict(_base_parameters(model))
    for name, tensor in base.items():
        shape = checkpoint.specs[name].shape if name in checkpoint.specs else None
        if shape is not None and tensor.dtype.is_floating_point and tuple(tensor.shape) != shape:
            raise ConfigError(
                f"the trainer's {name} has shape {tuple(tensor.shape)}, the servers' checkpoint {shape}: an adapter "
                "can't change that. Were tokens added (resize_token_embeddings)? Save the resized base model first and "
                "serve that"
            )
    stored = read_rows(checkpoint, [name for name, tensor in base.items() if tensor.dtype.is_floating_point])
    for name, expected in stored.items():
        live = base[name]
        row = live.detach()[live.shape[0] // 2] if live.dim() > 1 else live.detach()
        dtypes = (live.dtype, expected.dtype, served_dtype or live.dtype)
        allowed = _ROUNDINGS * max(torch.finfo(dtype).eps for dtype in dtypes) * float(expected.abs().max())
        if not float((row.float().cpu() - expected.float()).abs().max()) <= allowed:
            raise ConfigError(
                f"the trainer's base weight {name} is not the one in the servers' checkpoint, and transport='lora' "
                f"sends the adapter alone. {_what_changes(model)}transport='broadcast' sends the merged model"
            )
    _refuse_unseen_changes(model, base, stored)


def _refuse_unseen_changes(model: Any, base: Mapping[str, torch.Tensor], compared: Mapping[str, object]) -> None:
    """Refuse an initialisation that changes the weights below the adapter, where they could not be compared."""
    changed = _changing_init(model)
    if changed and not compared:
        raise ConfigError(
            f"init_lora_weights={changed!r} changes the weights below the adapter, which transport='lora' does not "
            "send (and the checkpoint can't be read here to compare): transport='broadcast' sends the merged model"
        )


def _what_changes(model: Any) -> str:
    changed = _changing_init(model)
    if changed:
        return (
            f"init_lora_weights={changed!r} changes it: convert the adapter (save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)) and load it on the unchanged base model; or "
        )
    return (
        "Was another adapter merged into it (merge_and_unload), or was it loaded from another checkpoint or revision? "
        "Serve the model that the trainer started from, or "
    )


def _changing_init(model: Any) -> str | None:
    inits = [getattr(config, "init_lora_weights", True) for config in model.peft_config.values()]
    return next((init for init in inits if isinstance(init, str) and changes_base_weights(init)), None)


def _base_parameters(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters below the adapters under their names in a checkpoint. Those with a merged adapter are left out."""
    merged = {
        id(parameter)
        for layer in model.modules()
        if hasattr(layer, "merged_adapters") and layer.merged_adapters
        for parameter in layer.get_base_layer().parameters()
    }
    for name, parameter in model.named_parameters():
        if id(parameter) not in merged and not parameter.is_meta:
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), parameter


def _expected_sizes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each module, as SGLang computes them from the configuration; what it lacks is left out."""
    keys = ("hidden_size", "num_attention_heads")
    if any(not isinstance(config.get(key), int) for key in keys):
        return {}
    hidden, heads = (int(config[key]) for key in keys)
    groups = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    sizes = {
        "self_attn.q_proj": (hidden, heads * head_dim),
        "self_attn.k_proj": (hidden, groups * head_dim),
        "self_attn.v_proj": (hidden, groups * head_dim),
        "self_attn.qkv_proj": (hidden, (heads + 2 * groups) * head_dim),
        "self_attn.o_proj": (heads * head_dim, hidden),
    }
    inner = config.get("intermediate_size")
    if isinstance(inner, int):
        sizes |= {
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.gate_up_proj": (hidden, 2 * inner),
            "mlp.down_proj": (inner, hidden),
        }
    return sizes


def _module(tensor_name: str) -> str:
    return tensor_name.partition("model.model.")[2].rpartition(".lora_")[0]
