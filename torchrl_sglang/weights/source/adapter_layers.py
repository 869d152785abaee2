"""A PEFT model's LoRA layers as one adapter that SGLang computes exactly.

Shape suffixes: R rank, I input features, O output features.

SGLang's adapters have one rank and one scale, and its attention and MLP keep q, k, v and gate, up in stacked buffers
that an adapter must fill completely: one without a member is refused, or ends the server at its first request (0.5.23).
So ranks are padded with zeros to the largest, scales that differ are multiplied into B, and absent members of a stack
get zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.source.adapter_features import effective_adapters

__all__ = ["SERVED_MODULES", "Adapter", "read_adapter"]

_STACKS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
SERVED_MODULES: Mapping[str, Sequence[str]] = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
}
"""The modules of a decoder layer that can be adapted, by their parent's name."""

_LAYERS = (
    *("Linear", "Linear4bit", "Linear8bitLt", "GPTQLoraLinear", "AwqLoraLinear", "HqqLoraLinear", "EetqLoraLinear"),
    *("AqlmLoraLinear", "TorchaoLoraLinear", "IncLoraLinear", "TeLinear"),
)
"""PEFT's layers whose forward pass is that of the base plus ``scale * B (A x)``."""

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_LANGUAGE_MODEL = frozenset({"base_model", "model", "language_model", "module", ""})


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter as SGLang takes it.

    Attributes:
        config: what ``adapter_config.json`` would hold; its ``target_modules`` are names of modules.
        tensors: ``...lora_A.weight`` with shape (R, I) and ``...lora_B.weight`` with shape (O, R), all of one dtype.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class _Place(NamedTuple):
    layer: int
    parent: str
    module: str

    @property
    def prefix(self) -> str:
        return f"base_model.model.model.layers.{self.layer}.{self.parent}.{self.module}"


class _Part(NamedTuple):
    """One adapter's contribution to one module: ``scale * b_OR @ a_RI``."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float


def read_adapter(model: Any) -> Adapter:
    """Read what the forward pass adds, layer by layer.

    Args:
        model: a PEFT model, or a transformers model with PEFT adapters.

    Returns:
        The sum of all adapters that are in effect.

    Raises:
        ConfigError: no adapter is in effect, or one is on a module that SGLang can't adapt.
    """
    parts, siblings = _read_layers(model)
    if not parts:
        raise ConfigError(
            "no adapter is in effect, so there is nothing to send: model.enable_adapter_layers() after "
            "disable_adapter_layers(), model.set_adapter(name) to choose one"
        )
    rank = max(sum(len(part.a_RI) for part in of_one) for of_one in parts.values())
    scales = {part.scale for of_one in parts.values() for part in of_one}
    scale = scales.pop() if len(scales) == 1 else None
    dtype = _common_dtype(parts, exact=scale is None)
    tensors: dict[str, torch.Tensor] = {}
    for place in _with_stacks(parts, siblings):
        if place in parts:
            a_RI, b_OR = _combine(parts[place], rank, dtype, fold=scale is None)
        else:
            inputs, outputs = siblings[place]
            device = next(iter(parts.values()))[0].a_RI.device
            a_RI = torch.zeros(rank, inputs, dtype=dtype, device=device)
            b_OR = torch.zeros(outputs, rank, dtype=dtype, device=device)
        tensors[f"{place.prefix}.lora_A.weight"] = a_RI
        tensors[f"{place.prefix}.lora_B.weight"] = b_OR
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank * (1.0 if scale is None else scale),
        "target_modules": sorted({place.module for place in _with_stacks(parts, siblings)}),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
    }
    return Adapter(config=config, tensors=tensors)


def _read_layers(model: Any) -> tuple[dict[_Place, list[_Part]], dict[_Place, tuple[int, int]]]:
    """The parts of each adapted module; and (I, O) of those modules that share a stack with one and aren't adapted."""
    from peft.tuners.lora.layer import LoraLayer

    parts: dict[_Place, list[_Part]] = {}
    siblings: dict[_Place, tuple[int, int]] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not (names := effective_adapters(layer)):
            continue
        place = _place(path, layer)
        if place in parts:
            raise ConfigError(f"two adapted modules would be {place.prefix} for SGLang; the second is {path}")
        parts[place] = [_part(layer, name, path) for name in names]
        stack = _STACKS[place.parent]
        for other in stack if place.module in stack else ():
            siblings[place._replace(module=other)] = _sizes(model, path.removesuffix(place.module) + other)
    return parts, siblings


def _place(path: str, layer: Any) -> _Place:
    plain = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
    match = re.fullmatch(r"(.*?)\.?layers\.(\d+)\.(\w+)\.(\w+)", plain)
    kind = type(layer).__name__
    served = match is not None and match[4] in SERVED_MODULES.get(match[3], ())
    if match is None or not served or not set(match[1].split(".")) <= _LANGUAGE_MODEL or kind not in _LAYERS:
        known = ", ".join(f"{parent}.{name}" for parent, names in SERVED_MODULES.items() for name in names)
        raise ConfigError(
            f"the adapter is on {plain!r} (PEFT's {kind}), and transport='lora' sends adapters of a language model's "
            f"decoder layers, on {known}: leave it out with exclude_modules, or transport='broadcast' sends the merged "
            "model"
        )
    return _Place(int(match[2]), match[3], match[4])


def _part(layer: Any, name: str, path: str) -> _Part:
    a_RI, b_OR = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    scale = float(layer.scaling[name])
    if a_RI.is_meta or b_OR.is_meta:
        raise ConfigError(f"the adapter on {path} is on the meta device: load its values before the sync")
    if not math.isfinite(scale):
        raise ConfigError(f"the adapter on {path} has the scale {scale}: give finite lora_alpha and alpha_pattern")
    return _Part(a_RI, b_OR, scale)


def _sizes(model: Any, path: str) -> tuple[int, int]:
    try:
        module = model.get_submodule(path)
        return int(module.in_features), int(module.out_features)
    except AttributeError:
        raise ConfigError(
            f"the model has no linear layer {path}, which SGLang stacks with the adapted ones: it can't be sent by "
            "transport='lora'; transport='broadcast' sends the merged model"
        ) from None


def _with_stacks(parts: Mapping[_Place, object], siblings: Mapping[_Place, object]) -> Iterator[_Place]:
    return iter(sorted({*parts, *siblings}))


def _common_dtype(parts: Mapping[_Place, list[_Part]], *, exact: bool) -> torch.dtype:
    """One dtype for all tensors: SGLang concatenates them. float32 unless all are of one half precision."""
    dtypes = {tensor.dtype for of_one in parts.values() for part in of_one for tensor in part[:2]}
    alike = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return alike if alike in (torch.bfloat16, torch.float16) and not exact else torch.float32


def _combine(parts: Sequence[_Part], rank: int, dtype: torch.dtype, *, fold: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair of factors for the sum of ``parts``, padded with zeros to ``rank``."""
    device = parts[0].a_RI.device
    a_RI = torch.zeros(rank, parts[0].a_RI.shape[1], dtype=dtype, device=device)
    b_OR = torch.zeros(parts[0].b_OR.shape[0], rank, dtype=dtype, device=device)
    start = 0
    for part in parts:
        end = start + len(part.a_RI)
        a_RI[start:end] = part.a_RI
        b_OR[:, start:end] = part.b_OR.to(dtype) * part.scale if fold else part.b_OR
        start = end
    return a_RI, b_OR
