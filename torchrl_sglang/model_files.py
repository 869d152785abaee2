"""Finds and reads a checkpoint's files on this machine, from its folder or its hub name.

Nothing is downloaded, except the model named ``SmolLM2``. Also loads tokenizers. All other modules get checkpoint files
through this one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.smollm2 import is_smollm2, smollm2_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "find_local_path",
    "find_model_file",
    "load_tokenizer",
    "read_model_json",
    "read_safetensors_header",
    "read_vocab_size",
    "require_model_folder",
]


def find_local_path(model: str | Path) -> Path | None:
    """The path of a checkpoint that is given as one; ``None`` for a hub name, also one in the local cache.

    ``SmolLM2`` is the path of :func:`smollm2_checkpoint`, which the first call makes.

    Raises:
        ConfigError: the model is ``SmolLM2``, and can't be made.

    Examples:
        >>> find_local_path("Qwen/Qwen3-0.6B") is None
        True
    """
    if is_smollm2(model):
        return smollm2_checkpoint()
    path = Path(model).expanduser()
    return path.absolute() if path.exists() else None


def find_model_file(model: str | Path, name: str, revision: str | None = None) -> Path | None:
    """One file of a checkpoint.

    Args:
        model: a folder, or a hub name that is in the local Hugging Face cache.
        name: file name, such as ``"config.json"``.
        revision: branch, tag or commit of a hub model; ``None`` is ``main``. A folder has one revision.

    Returns:
        Its path; ``None`` if the checkpoint has no such file or is not on this machine.

    Examples:
        >>> find_model_file("/no/such/folder", "config.json") is None
        True
    """
    folder = find_local_path(model)
    if folder is not None and folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache  # slow to import, and not needed for folders
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(model), name, revision=revision)
    except HFValidationError:  # a path that exists on the server's machine only
        return None
    return Path(cached) if isinstance(cached, str) else None


def require_model_folder(model: str | Path, *, hint: str, revision: str | None = None) -> Path:
    """The folder that holds a checkpoint.

    Args:
        model: a folder, or a hub name that is in the local Hugging Face cache.
        revision: branch, tag or commit of a hub model; ``None`` is ``main``.
        hint: what to do without it; the error ends with this.

    Raises:
        ConfigError: the checkpoint is not on this machine.
    """
    folder = find_local_path(model)
    if folder is not None and folder.is_dir():
        return folder
    config = find_model_file(model, "config.json", revision)
    if config is None:
        named = f"{model} at revision {revision}" if revision else str(model)
        raise ConfigError(f"{named} is neither a folder on this machine nor in the local Hugging Face cache. {hint}")
    return config.parent


def read_model_json(model: str | Path, name: str, revision: str | None = None) -> dict[str, Any]:
    """A JSON file of a checkpoint, such as ``"generation_config.json"``; empty if it is absent or not readable."""
    file = find_model_file(model, name, revision)
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_safetensors_header(file: Path, max_bytes: int) -> dict[str, Any]:
    """The header of a ``.safetensors`` file: per tensor its dtype, shape and offsets, and ``__metadata__``.

    Source: the safetensors format. Eight bytes give the header's length (little-endian), then the header follows as
    JSON.

    Args:
        file: the file.
        max_bytes: a longer header means a damaged file.

    Raises:
        ConfigError: the file is truncated or a Git LFS pointer.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        raw = stream.read(length) if length <= max_bytes else b""
    try:
        header: dict[str, Any] = json.loads(raw)
    except ValueError:
        raise ConfigError(
            f"{file} is not a safetensors file: its header can't be read. It may be cut short or a Git LFS pointer; "
            "download it again."
        ) from None
    return header


def read_vocab_size(model: str | Path, revision: str | None = None) -> int | None:
    """Rows of the checkpoint's embedding, from its ``config.json``; ``None`` if the file can't be read here."""
    config = read_model_json(model, "config.json", revision)
    for section in (config, config.get("text_config") or {}, config.get("llm_config") or {}):
        if isinstance(section.get("vocab_size"), int):
            return int(section["vocab_size"])
    return None


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        path: a folder or hub name; for a server's own tokenizer ``pool.info.tokenizer_path``.
        revision: branch, tag or commit of a hub name; for a server's own tokenizer ``pool.info.revision``.

    Raises:
        ConfigError: it can't be read from this machine.
    """
    from transformers import AutoTokenizer  # slow to import, and not needed for token-only use

    found = find_local_path(path)
    # A folder has no revisions: transformers would look for a sub-folder of refs.
    chosen = {} if revision is None or found is not None else {"revision": revision}
    try:
        return AutoTokenizer.from_pretrained(path if found is None else found, **chosen)
    except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        named = f"{path!r} at revision {revision!r}" if chosen else repr(path)
        raise ConfigError(f"the tokenizer {named} can't be loaded here ({error}); pass tokenizer=") from error
