"""Tiny language models with random weights, written to disk in a second and without a download.

They are real checkpoints (config, tokenizer, safetensors) that SGLang serves and transformers loads, with about 120
thousand parameters. Their greedy output does not repeat one token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import tokenizers
import torch
import transformers

from torchrl_sglang.cached_folder import cached_folder
from torchrl_sglang.config import nearest_name
from torchrl_sglang.errors import ConfigError

__all__ = ["CHAT_TEMPLATE", "VOCAB_SIZE", "TinyArch", "make_tiny_model"]

TinyArch = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "llama_classifier"]
"""Architectures of tiny models; ``llama_classifier`` is a reward model: it returns one score for a text."""

VOCAB_SIZE = 320
"""Token ids of every tiny model are ``0 <= id < VOCAB_SIZE``: 3 special tokens, 256 bytes, 61 merges."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {% generation %}{{- message['content'] -}}{% endgeneration %}
    {%- else -%}
        {{- message['content'] -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""ChatML. TorchRL makes its assistant masks from the ``generation`` tags around an assistant's message."""

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0 (pad), 1 (bos), 2 (eos)
_DTYPES = ("float32", "bfloat16", "float16")
# Larger than the usual 0.02, so that attention matters and greedy decoding does not repeat one token.
_WEIGHT_STD = 0.3
# The tokenizer's merges are trained on it; long enough for all 61.
_TRAINING_TEXT = (
    "What is the capital of France? The capital of France is Paris. What is 2 + 3? 2 + 3 = 5. Answer with only the "
    "number. The quick brown fox jumps over the lazy dog, and the dog does not mind at all. You are a helpful "
    "assistant. Hello world! How are you today? I am fine, thank you. 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18."
)
_RECIPE_FORMAT = 1


def make_tiny_model(
    path: str | Path,
    *,
    arch: TinyArch = "llama",
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    context_length: int = 2048,
) -> Path:
    """Write a tiny random model with its tokenizer to ``path``, unless the same one is already there.

    The same arguments give the same weights. The caller's random number generator is neither used nor changed. The
    tokenizer is byte-level (every text has ids, and decoding them returns the text), with a ChatML template.

    TorchRL chooses a chat template by words in the *path* of a tokenizer ("llama", "qwen", "falcon", "deepseek"...)
    before it uses the tokenizer's own template: give the folder a name without these words.

    Args:
        path: folder to write.
        arch: architecture, see :data:`TinyArch`.
        seed: seed of the weights; another seed gives another model of the same shapes.
        hidden: hidden size; a multiple of ``heads``.
        layers: number of decoder layers.
        heads: number of attention heads; a multiple of ``kv_heads``.
        kv_heads: number of key/value heads; tensor parallelism over ``n`` ranks needs a multiple of ``n``.
        tied: input and output embedding are one tensor.
        dtype: dtype of the weights on disk.
        context_length: longest prompt plus response, in tokens.

    Returns:
        The folder, absolute.

    Raises:
        ConfigError: sizes that don't divide, an unknown architecture or dtype, or ``path`` holds other files.

    Examples:
        >>> import tempfile
        >>> folder = make_tiny_model(Path(tempfile.mkdtemp()) / "tiny", seed=1)
        >>> tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        >>> tokenizer.decode(tokenizer("Hello world!")["input_ids"])
        'Hello world!'
        >>> make_tiny_model(folder, arch="lama")
        Traceback (most recent call last):
        ...
        torchrl_sglang.errors.ConfigError: unknown arch 'lama'. Did you mean 'llama'?
    """
    if arch not in get_args(TinyArch):
        raise ConfigError(f"unknown arch {arch!r}.{nearest_name(arch, get_args(TinyArch))}")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype must be one of {_DTYPES}, got {dtype!r}")
    _check_sizes(hidden, layers, heads, kv_heads, context_length)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": tied,
    }
    recipe = {
        "format": _RECIPE_FORMAT,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "arch": arch,
        "seed": seed,
        "dtype": dtype,
        **sizes,
    }

    def build(folder: Path) -> None:
        tokenizer = _tokenizer()
        tokenizer.save_pretrained(folder)
        _model(arch, seed, sizes, tokenizer).to(getattr(torch, dtype)).save_pretrained(folder)

    return cached_folder(Path(path), recipe, build)


def _check_sizes(hidden: int, layers: int, heads: int, kv_heads: int, context_length: int) -> None:
    if min(hidden, layers, heads, kv_heads, context_length) < 1 or hidden % heads or heads % kv_heads:
        raise ConfigError(
            "sizes must be positive, hidden a multiple of heads, heads a multiple of kv_heads; got "
            f"hidden={hidden}, layers={layers}, heads={heads}, kv_heads={kv_heads}, context_length={context_length}"
        )


def _tokenizer() -> Any:
    """Byte-level BPE with merges, so that a text has more than one tokenization, as with real models."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([_TRAINING_TEXT], trainer)
    pad, bos, eos = _SPECIAL_TOKENS
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _model(arch: TinyArch, seed: int, sizes: dict[str, Any], tokenizer: Any) -> Any:
    settings = {
        **sizes,
        "vocab_size": VOCAB_SIZE,
        "initializer_range": _WEIGHT_STD,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
        if arch == "llama_classifier":
            config = transformers.LlamaConfig(**settings, num_labels=1)
            return transformers.LlamaForSequenceClassification(config)
        if arch == "qwen2":
            return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
        if arch == "qwen3":
            return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings, head_dim=head_dim))
        return transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **settings,
                head_dim=head_dim,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=sizes["hidden_size"],
                norm_topk_prob=True,
            )
        )
