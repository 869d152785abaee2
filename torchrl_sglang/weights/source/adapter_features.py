"""Which of PEFT's features an adapter for SGLang can have; the others are refused by name.

SGLang computes ``W x + scale * B (A x)`` with one rank and one scale per adapter, and ignores everything else that an
adapter may hold. Source: SGLang 0.5.23 (``srt/lora``), PEFT 0.21.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torchrl_sglang.errors import ConfigError

__all__ = ["FIELDS", "changes_base_weights", "effective_adapters", "refuse_other_features"]

FIELDS: Mapping[str, Literal["layers", "training", "checked", "refused"]] = {
    **dict.fromkeys(
        (
            *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
            *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        ),
        "layers",
    ),
    **dict.fromkeys(
        (
            *("task_type", "auto_mapping", "peft_version", "revision", "base_model_name_or_path", "inference_mode"),
            *("lora_dropout", "runtime_config", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
            *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "velora_config", "monteclora_config"),
        ),
        "training",
    ),
    **dict.fromkeys(("peft_type", "bias", "init_lora_weights"), "checked"),
    **dict.fromkeys(
        (
            *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
            *("use_dora", "lora_bias", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
            *("kasa_config", "megatron_config"),
        ),
        "refused",
    ),
}
"""Every field of PEFT's ``LoraConfig``. ``layers``: its effect is in the layers' tensors and scales, which are read;
``training``: no effect on what the trained adapter computes; ``checked``: some values are refused, below; ``refused``:
SGLang can't compute it."""

_PLAIN_VARIANTS = ("VeloraLinearVariant", "MontecloraLinearVariant", "MiCALinearVariant")
"""PEFT's variants that differ from LoRA in training alone."""

_INSTEAD = "transport='broadcast' or 'disk' sends the merged model"


def refuse_other_features(model: Any) -> None:
    """Refuse what SGLang would ignore or get wrong.

    Args:
        model: a PEFT model, or a transformers model with PEFT adapters.

    Raises:
        ConfigError: naming the feature.
    """
    for name in dict.fromkeys(_names_in_use(model)):
        _check_config(model, name, model.peft_config[name])
    _check_modules(model)
    _check_trained(model)


def effective_adapters(layer: Any) -> list[str]:
    """The adapters that this tuner layer's forward pass adds: merged ones replace active ones.

    Source: ``forward`` of PEFT's LoRA layers.
    """
    if layer.disable_adapters:
        return []
    return [name for name in layer.merged_adapters or layer.active_adapters if name in layer.scaling]


def changes_base_weights(init: object) -> bool:
    """Whether this ``init_lora_weights`` changes the weights below the adapter (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).

    Examples:
        >>> changes_base_weights(True), changes_base_weights("gaussian"), changes_base_weights("pissa_niter_4")
        (False, False, True)
    """
    return isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal", "mica", "true", "false")


def _names_in_use(model: Any) -> Iterator[str]:
    active = model.active_adapters
    yield from (name for name in (active() if callable(active) else active) if name in model.peft_config)
    for layer in _tuner_layers(model):
        if isinstance(getattr(layer, "scaling", None), dict):
            yield from (name for name in effective_adapters(layer) if name in model.peft_config)


def _check_config(model: Any, name: str, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ConfigError(f"adapter {name!r} is of PEFT's type {kind}, and SGLang serves LoRA only: {_INSTEAD}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        role = FIELDS.get(field.name)
        if role == "refused" and value:
            raise ConfigError(
                f"adapter {name!r} has {field.name}={_short(value)}, and SGLang serves an adapter's LoRA "
                f"matrices alone: leave it out, or {_INSTEAD}"
            )
        if role is None and value != _default(field):
            raise ConfigError(
                f"adapter {name!r} has {field.name}={_short(value)}, which came with a newer PEFT than this package "
                f"knows: it can't tell whether SGLang computes it. {_INSTEAD}"
            )
    if config.bias != "none" and _trained_biases(model, config.bias):
        raise ConfigError(
            f"adapter {name!r} has bias={config.bias!r}: SGLang serves the checkpoint's biases. Train with "
            f"bias='none', or {_INSTEAD}"
        )


def _trained_biases(model: Any, which: str) -> bool:
    if which == "lora_only":
        return any(getattr(layer.get_base_layer(), "bias", None) is not None for layer in _tuner_layers(model))
    return any(name.endswith("bias") for name, _ in model.named_parameters())


def _check_modules(model: Any) -> None:
    """Refuse what is in the model without being in a configuration of LoRA."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not module.disable_adapters and module.active_adapters:
            raise ConfigError(
                f"{path} is trained besides the adapter ({type(module).__name__}), and SGLang takes no such weights "
                f"with an adapter: leave it out, or {_INSTEAD}"
            )
    for layer in _tuner_layers(model):
        if not isinstance(layer, LoraLayer):
            if layer.active_adapters and not layer.disable_adapters:
                raise ConfigError(f"the model has layers of PEFT's {type(layer).__name__}, not LoRA: {_INSTEAD}")
            continue
        for name in effective_adapters(layer):
            variant = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else None
            if variant is not None and variant not in _PLAIN_VARIANTS:
                raise ConfigError(f"adapter {name!r} uses PEFT's {variant}, which SGLang does not compute: {_INSTEAD}")
            if layer.lora_bias.get(name):
                raise ConfigError(f"adapter {name!r} has lora_bias=True, which SGLang does not compute: {_INSTEAD}")


def _check_trained(model: Any) -> None:
    """Refuse parameters that an optimiser changes but that belong to no adapter: they would not be sent."""
    adapters = {id(own) for layer in _tuner_layers(model) for own in _own_parameters(layer)}
    names = [name for name, own in model.named_parameters() if own.requires_grad and id(own) not in adapters]
    if names:
        raise ConfigError(
            f"{len(names)} parameters outside the adapter are trained, e.g. {names[0]!r}, and transport='lora' sends "
            f"the adapter alone: freeze them (requires_grad_(False)), or {_INSTEAD}"
        )


def _own_parameters(layer: Any) -> Iterator[Any]:
    base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    return (parameter for parameter in layer.parameters() if id(parameter) not in base)


def _tuner_layers(model: Any) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def _default(field: Any) -> object:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
