"""Reads the tensors of a checkpoint folder, so that a folder can be sent to servers without making a model of it."""

from __future__ import annotations

from pathlib import Path

import torch

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import require_model_folder
from torchrl_sglang.weights.checkpoint.headers import weight_files

__all__ = ["read_tensors"]

_HINT = (
    "To send weights give a folder with safetensors files (as save_pretrained writes them), a module, a TensorDict, a "
    "dict of tensors or an iterator."
)


def read_tensors(model: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name. They are mapped from the files: a value is read when it is used.

    Args:
        model: a folder with safetensors files (one or several, with an index), one such file, or a hub name that is in
            the local Hugging Face cache.

    Raises:
        ConfigError: there is no such folder, it holds no safetensors files, a LoRA adapter alone, or a damaged file.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return _tensors_of(path)
    if path.is_file():
        raise ConfigError(f"{model} is not a safetensors file. {_HINT}")
    folder = require_model_folder(model, hint=_HINT)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{model} holds a LoRA adapter, not a whole model: load it with PeftModel.from_pretrained(base_model, "
            f"{str(model)!r}) and send that model; its weights are merged on the way"
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder, purpose="weights are read from safetensors files"):
        tensors.update(_tensors_of(file))
    return tensors


def _tensors_of(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a safetensors file: {error}. Was it saved completely?") from None
