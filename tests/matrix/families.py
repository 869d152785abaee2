"""Tiny random checkpoints of model families, each with the settings of its family that a server can get wrong.

All weights are random, biases and norms included, so that a part that is left out or put in the wrong place shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["FAMILIES", "Family", "make_model"]

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_OTHER_NAMES: dict[str, dict[str, str | None]] = {
    "gpt2": {
        "num_key_value_heads": None,
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
}
_ROPE = {"rope_theta": 10000.0}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
        architecture: name of the class in transformers, which SGLang looks up.
        config: name of the configuration class.
        settings: what differs from the sizes that all families share.
        std: standard deviation of the matrices; so large that attention matters, and that no answer repeats one token.
        embedding_std: likewise of the embedding; ``std`` by default. Where the model scales the embedding up, a smaller
            one is needed, or answers only repeat the last token.
        about: what of this family the settings cover, for the docs.
        lora_targets: modules that an adapter changes; none where SGLang takes no adapter for the family.
        refused: why no server is launched, as a pattern of the error.
        atol: largest difference of a log-prob from transformers'.
    """

    architecture: str
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    std: float = 0.25
    embedding_std: float | None = None
    about: str = ""
    lora_targets: tuple[str, ...] = ()
    refused: str = ""
    atol: float = 1e-4


FAMILIES: dict[str, Family] = {
    "Llama": Family(
        architecture="LlamaForCausalLM",
        config="LlamaConfig",
        settings={
            "head_dim": 32,
            "rope_parameters": {
                **_ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        lora_targets=_ATTENTION,
        about="llama3 rope scaling, head size other than hidden / heads",
    ),
    "Mistral": Family(
        architecture="MistralForCausalLM",
        config="MistralConfig",
        settings={"sliding_window": None, "head_dim": 32},
        lora_targets=_ATTENTION,
        about="no sliding window",
    ),
    "Qwen2": Family(
        architecture="Qwen2ForCausalLM",
        config="Qwen2Config",
        settings={
            "tie_word_embeddings": True,
            "rope_parameters": {
                **_ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        lora_targets=_ATTENTION,
        about="attention biases, tied embeddings, yarn rope scaling",
    ),
    "Qwen3": Family(
        architecture="Qwen3ForCausalLM",
        config="Qwen3Config",
        settings={"tie_word_embeddings": True, "head_dim": 32},
        lora_targets=_ATTENTION,
        about="query and key norms, tied embeddings, head size other than hidden / heads",
    ),
    "Qwen3-MoE": Family(
        architecture="Qwen3MoeForCausalLM",
        config="Qwen3MoeConfig",
        settings={
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
        lora_targets=_ATTENTION,
        about="experts in every layer, query and key norms",
    ),
    "Gemma": Family(
        architecture="GemmaForCausalLM",
        config="GemmaConfig",
        settings={"head_dim": 32},
        embedding_std=0.05,
        lora_targets=_ATTENTION,
        atol=1e-2,  # SGLang computes GELU exactly, where the model has its approximation by tanh
        about="scaled and tied embeddings, norms with an offset",
    ),
    "Gemma 2": Family(
        architecture="Gemma2ForCausalLM",
        config="Gemma2Config",
        settings={
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": None,
            "hidden_act": "gelu_pytorch_tanh",  # SGLang reads it; transformers 5 has hidden_activation only
        },
        embedding_std=0.05,
        lora_targets=_ATTENTION,
        about="sliding window in every other layer, capped output logits; no capped attention logits",
    ),
    "Gemma 3": Family(
        architecture="Gemma3ForCausalLM",
        config="Gemma3TextConfig",
        settings={
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        },
        embedding_std=0.006,
        lora_targets=_ATTENTION,
        about="sliding windows, linear rope scaling in the full layers only, scaled and tied embeddings",
    ),
    "GPT-2": Family(
        architecture="GPT2LMHeadModel",
        config="GPT2Config",
        settings={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        about="learned positions, biases everywhere, transposed matrices in the checkpoint, tied embeddings",
    ),
    "Phi": Family(
        architecture="PhiForCausalLM",
        config="PhiConfig",
        settings={
            "num_key_value_heads": 4,
            "rope_parameters": {**_ROPE, "rope_type": "default", "partial_rotary_factor": 0.5},
        },
        refused="bias of the output layer",
        about="partial rotation, parallel attention and MLP, biases, also on the output",
    ),
    "Phi-3": Family(
        architecture="Phi3ForCausalLM",
        config="Phi3Config",
        settings={"sliding_window": None},
        about="fused projections in the checkpoint",
    ),
    "OLMo": Family(
        architecture="OlmoForCausalLM",
        config="OlmoConfig",
        settings={"clip_qkv": None, "num_key_value_heads": 4},
        lora_targets=_ATTENTION,
        about="norms without weights",
    ),
    "OLMo 2": Family(
        architecture="Olmo2ForCausalLM",
        config="Olmo2Config",
        lora_targets=_ATTENTION,
        about="norms after attention and MLP",
    ),
    "Mixtral": Family(
        architecture="MixtralForCausalLM",
        config="MixtralConfig",
        settings={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        lora_targets=_ATTENTION,
        about="experts in every layer",
    ),
}


def make_model(family: Family, tokenizer: Any, folder: Path, *, seed: int, vocab_size: int | None = None) -> Path:
    """Write a checkpoint of ``family`` with ``tokenizer`` to ``folder``.

    Args:
        family: of :data:`FAMILIES`.
        tokenizer: saved beside the weights; its special tokens become the model's.
        folder: created.
        seed: of the weights.
        vocab_size: rows of the embedding; the tokenizer's size by default.
    """
    model = build(family, tokenizer, seed=seed, vocab_size=vocab_size)
    # Several EOS ids, as chat models have: the second is a token that the model generates soon.
    prompt = torch.randint(model.config.vocab_size, (1, 6), generator=torch.Generator().manual_seed(3))
    soon = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=4)[0, -1]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, int(soon)]
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def build(family: Family, tokenizer: Any, *, seed: int, vocab_size: int | None = None) -> Any:
    """The model itself, in float32."""
    names = next((names for start, names in _OTHER_NAMES.items() if family.config.lower().startswith(start)), {})
    renamed = {names.get(name, name): value for name, value in _SIZES.items()}
    sizes = {name: value for name, value in renamed.items() if name is not None}
    config = getattr(transformers, family.config)(
        **{**sizes, **family.settings},
        vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.architecture)(config).float().eval()
        randomize(model, family)
    return model


def randomize(model: Any, family: Family) -> None:
    """Overwrite every parameter; the caller seeds torch. Vectors are biases, or factors of a norm."""
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                special = parameter is embedding and family.embedding_std is not None
                parameter.normal_(0.0, family.embedding_std if special else family.std)
            else:
                parameter.add_(torch.randn_like(parameter) * (0.1 if name.endswith("bias") else 0.2))
