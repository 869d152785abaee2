"""Settings of a checkpoint that SGLang ignores: it would serve the model, with other log-probs than the model's own.

Found by comparing SGLang 0.5.23 with transformers 5.19, family by family (``tests/matrix``). Everything here is silent
in SGLang: no error, no line in its log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["find_unsupported"]

# These classes attend to all earlier tokens, whatever `sliding_window` says.
_NO_SLIDING_WINDOW = frozenset(
    {
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Starcoder2ForCausalLM",
    }
)
# These make every layer a mixture of experts; the dense layers' weights are never loaded.
_ONLY_EXPERT_LAYERS = frozenset({"Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"})
# These take no scaling of rotary positions from the checkpoint.
_NO_ROPE_SCALING = frozenset({"PhiForCausalLM", "OlmoForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM"})
# These leave out the biases that a setting asks for.
_NO_BIASES = {
    "mlp_bias": frozenset({"GraniteForCausalLM", "LlamaForCausalLM"}),
    "attention_bias": frozenset({"GemmaForCausalLM", "GraniteForCausalLM"}),
}
# These leave out the bias of the output layer.
_NO_OUTPUT_BIAS = frozenset({"PhiForCausalLM", "GPTJForCausalLM"})
# Attention backends that leave out the cap on attention logits. torch_native is the only one of SGLang's CPU engine.
_NO_LOGIT_CAP = frozenset({"torch_native", "flex_attention"})


def find_unsupported(
    config: Mapping[str, Any], *, attention_backend: str | None = None, context_length: int | None = None
) -> list[str]:
    """What of a checkpoint SGLang would leave out, each with what to do about it.

    Args:
        config: the checkpoint's ``config.json``.
        attention_backend: the server's ``--attention-backend``; ``None`` if it is not known.
        context_length: longest prompt plus response on the server; ``None`` is the checkpoint's.

    Examples:
        >>> config = {"architectures": ["MistralForCausalLM"], "sliding_window": 4096, "max_position_embeddings": 32768}
        >>> find_unsupported(config, context_length=4096)
        []
        >>> find_unsupported(config)[0][:61]
        'MistralForCausalLM: sliding_window=4096 is ignored, so tokens'
    """
    architecture = str((config.get("architectures") or [""])[0])
    text = {**config, **(config.get("text_config") or {})}
    found = [
        _sliding_window(architecture, text, context_length),
        _dense_layers(architecture, text),
        _rope_scaling(architecture, text),
        _biases(architecture, text),
        _output_bias(architecture, text),
        _logit_cap(text, attention_backend),
        _activation(architecture, text),
    ]
    return [f"{architecture}: {problem}" for problem in found if problem]


def _sliding_window(architecture: str, config: Mapping[str, Any], context_length: int | None) -> str:
    window = config.get("sliding_window")
    if architecture not in _NO_SLIDING_WINDOW or not isinstance(window, int):
        return ""
    if architecture.startswith("Qwen"):
        layers = config.get("layer_types") or []
        slides = "sliding_attention" in layers if layers else config.get("max_window_layers", 0) < _num_layers(config)
        if not config.get("use_sliding_window") or not slides:
            return ""
    longest = context_length or config.get("max_position_embeddings")
    if isinstance(longest, int) and longest <= window:
        return ""
    return (
        f"sliding_window={window} is ignored, so tokens after the first {window} would get wrong log-probs; set "
        f"context_length={window} (or remove sliding_window from config.json, if the trained model has none)"
    )


def _num_layers(config: Mapping[str, Any]) -> int:
    return int(config.get("num_hidden_layers") or 0)


def _dense_layers(architecture: str, config: Mapping[str, Any]) -> str:
    if architecture not in _ONLY_EXPERT_LAYERS:
        return ""
    dense, step = config.get("mlp_only_layers"), config.get("decoder_sparse_step") or 1
    if not dense and step == 1:
        return ""
    setting = f"mlp_only_layers={dense}" if dense else f"decoder_sparse_step={step}"
    return f"{setting} is ignored: layers without experts would compute with uninitialised weights; it can't be served"


def _rope_scaling(architecture: str, config: Mapping[str, Any]) -> str:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if architecture not in _NO_ROPE_SCALING or not isinstance(parameters, Mapping):
        return ""
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    kinds = {str(one.get("rope_type") or one.get("type") or "default") for one in (parameters, *nested)}
    scaled = sorted(kinds - {"default"})
    return f"rope scaling of type {scaled[0]!r} is ignored, so positions would be wrong" if scaled else ""


def _biases(architecture: str, config: Mapping[str, Any]) -> str:
    ignored = [name for name, classes in _NO_BIASES.items() if architecture in classes and config.get(name)]
    return f"{' and '.join(ignored)}=true is ignored: those biases are left out" if ignored else ""


def _output_bias(architecture: str, config: Mapping[str, Any]) -> str:
    has_bias = architecture in _NO_OUTPUT_BIAS or config.get("lm_head_bias")
    return (
        "the bias of the output layer (lm_head.bias) is left out, so every log-prob would be wrong" if has_bias else ""
    )


def _logit_cap(config: Mapping[str, Any], attention_backend: str | None) -> str:
    cap = config.get("attn_logit_softcapping")
    if not cap or attention_backend not in _NO_LOGIT_CAP:
        return ""
    return (
        f"attn_logit_softcapping={cap} is ignored by the attention backend {attention_backend!r} (the one of SGLang's "
        "CPU engine); serve it on a GPU, or a checkpoint without it"
    )


def _activation(architecture: str, config: Mapping[str, Any]) -> str:
    if architecture != "Gemma2ForCausalLM" or "hidden_act" in config:
        return ""
    return (
        'the server needs "hidden_act": "gelu_pytorch_tanh" in config.json, which transformers 5 does not write; add it'
    )
