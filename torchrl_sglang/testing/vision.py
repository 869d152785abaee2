"""A tiny vision-language model with random weights, written to disk in a second, for SGLang's CPU engine.

It has the architecture of the first LLaVA (a CLIP tower, a projector of two layers, a Llama), the only one that runs on
a CPU without torchvision: the image processors of newer models need it, and its CPU build is not a dependency.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from torchrl_sglang.cached_folder import cached_folder
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.testing.models import make_tiny_model

__all__ = ["VISION_SERVER_ARGS", "VISION_SERVER_DTYPE", "make_tiny_vision_model"]

VISION_SERVER_DTYPE = "float16"
"""SGLang runs models of this architecture in half precision only."""

VISION_SERVER_ARGS = ("--disable-fast-image-processor",)
"""The fast image processor needs torchvision."""

_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<image>' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
_IMAGE_SIZE, _PATCH_SIZE = 28, 14
_VISION_WIDTH = 32
_WEIGHT_STD = 0.3  # as in models.py, so that attention matters
_VOCAB_SIZE = 384  # room for <image>
_RECIPE_FORMAT = 1


def make_tiny_vision_model(path: str | Path, *, seed: int = 0) -> Path:
    """Write a tiny random vision-language model, unless the same one is already there.

    An image takes four tokens. Serve the model with ``dtype=VISION_SERVER_DTYPE, extra_args=VISION_SERVER_ARGS``. The
    folder can't be moved: its configuration holds the absolute path of the CLIP tower inside it.

    Args:
        path: folder to write.
        seed: seed of the weights.

    Returns:
        The folder, absolute.

    Raises:
        ConfigError: Pillow is not installed, or ``path`` holds other files.
    """
    place = Path(path).absolute()
    recipe = {"format": _RECIPE_FORMAT, "transformers": transformers.__version__, "seed": seed, "path": str(place)}
    return cached_folder(place, recipe, lambda folder: _build(folder, place, seed))


def _build(folder: Path, place: Path, seed: int) -> None:
    language = make_tiny_model(folder / "language", seed=seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = _TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = transformers.CLIPVisionModel(_tower_config())
        llama = transformers.LlamaForCausalLM(_language_config(language))
        weights = {name: value.contiguous() for name, value in llama.state_dict().items()}
        width = llama.config.hidden_size
        for layer, inputs in ((0, _VISION_WIDTH), (2, width)):
            weights[f"model.mm_projector.{layer}.weight"] = torch.randn(width, inputs) * _WEIGHT_STD
            weights[f"model.mm_projector.{layer}.bias"] = torch.randn(width) * _WEIGHT_STD
    tower.half().save_pretrained(folder / "clip_tower")
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        **llama.config.to_dict(),
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "dtype": "float16",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_aspect_ratio": "square",
        "mm_hidden_size": _VISION_WIDTH,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(place / "clip_tower"),
        "projector_hidden_act": "gelu",
        "text_config": llama.config.to_dict(),
        "vision_config": tower.config.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _processor(tokenizer).save_pretrained(folder)


def _tower_config() -> Any:
    return transformers.CLIPVisionConfig(
        hidden_size=_VISION_WIDTH,
        intermediate_size=2 * _VISION_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_IMAGE_SIZE,
        patch_size=_PATCH_SIZE,
        projection_dim=_VISION_WIDTH,
        initializer_range=_WEIGHT_STD,
    )


def _language_config(language: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(language)
    config.vocab_size = _VOCAB_SIZE
    return config


def _processor(tokenizer: Any) -> Any:
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as ImageProcessor
    except ImportError:  # before transformers 5
        from transformers import CLIPImageProcessor as ImageProcessor
    try:
        images = ImageProcessor(
            size={"shortest_edge": _IMAGE_SIZE}, crop_size={"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}
        )
    except ImportError as error:
        raise ConfigError(f"the vision model needs Pillow: pip install pillow ({error})") from error
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=_PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
