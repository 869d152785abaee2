"""Names, shapes and dtypes of a checkpoint's tensors, read from the headers of its safetensors files.

A server loads weights by checkpoint name and silently ignores names it doesn't know. So the headers are the source of
truth for what has to be sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import read_safetensors_header, require_model_folder
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec

__all__ = ["Checkpoint", "is_output_embedding", "weight_files"]

_DTYPES: dict[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}
_INDEX = "model.safetensors.index.json"
# Some old checkpoints contain these tables; SGLang 0.5.23 skips them while loading.
_SERVER_COMPUTED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
_MAX_HEADER_BYTES = 512 * 2**20  # a header is JSON of names and offsets; a larger one means a damaged file


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Names, shapes and dtypes of a checkpoint's tensors.

    Attributes:
        specs: checkpoint name to :class:`TensorSpec`; read-only.
        tied: whether output and input embedding are one tensor; then ``lm_head.weight`` need not be sent.
        quantization: the method of a pre-quantised checkpoint (``"fp8"``, ``"awq"``...), or ``None``.
        config: the model's ``config.json``; empty when unknown.
        path: folder it was read from, or ``None``.

    Examples:
        >>> checkpoint = Checkpoint.from_specs({"w": ((2, 3), torch.float32)})
        >>> checkpoint.specs["w"].nbytes, checkpoint.dtype
        (24, torch.float32)
    """

    specs: Mapping[str, TensorSpec]
    tied: bool = False
    quantization: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: Path | None = None

    @classmethod
    def read(cls, model_path: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Read the headers of a checkpoint's safetensors files. Loads no tensor and uses no network.

        Args:
            model_path: a local folder, or a hub name that is in the local Hugging Face cache.
            revision: branch, tag or commit of a hub name; for a server's checkpoint ``pool.info.revision``.

        Raises:
            ConfigError: the folder doesn't exist, has no safetensors files, or can't be read.
        """
        folder = require_model_folder(model_path, hint=_NO_CHECKPOINT, revision=revision)
        config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        specs: dict[str, TensorSpec] = {}
        for file in weight_files(folder):
            specs.update(_read_safetensors_header(file))
        return cls(
            specs=MappingProxyType(specs),
            tied=_is_tied(config, specs),
            quantization=_quantization(config, specs),
            config=config,
            path=folder,
        )

    @classmethod
    def from_specs(
        cls, specs: Mapping[str, tuple[Iterable[int], torch.dtype]] | Iterable[TensorSpec], *, tied: bool = False
    ) -> Checkpoint:
        """Describe a checkpoint by hand, for servers whose model path can't be read on this machine.

        Args:
            specs: name to ``(shape, dtype)``, or :class:`TensorSpec` records.
            tied: whether ``lm_head.weight`` and the input embedding are one tensor.
        """
        if isinstance(specs, Mapping):
            records = [TensorSpec(name=n, shape=tuple(shape), dtype=dtype) for n, (shape, dtype) in specs.items()]
        else:
            records = list(specs)
        return cls(specs=MappingProxyType({record.name: record for record in records}), tied=tied)

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating-point dtype of most elements; ``None`` if no tensor is floating-point."""
        counts: dict[torch.dtype, int] = {}
        for spec in self.specs.values():
            if spec.dtype.is_floating_point:
                counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.numel
        return max(counts, key=lambda dtype: counts[dtype]) if counts else None

    @property
    def largest_nbytes(self) -> int:
        """Bytes of the largest tensor, which a bucket must hold whole."""
        return max((spec.nbytes for spec in self.specs.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts, by its configuration."""
        config = self.config.get("text_config") or self.config
        return any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))

    def is_optional(self, name: str) -> bool:
        """Whether a trainer may leave ``name`` out: a tied output embedding, or a table that servers compute."""
        return (self.tied and is_output_embedding(name)) or self.is_server_computed(name)

    @staticmethod
    def is_server_computed(name: str) -> bool:
        """Whether servers compute this table themselves and ignore one that is sent."""
        return name.endswith(_SERVER_COMPUTED)


def is_output_embedding(name: str) -> bool:
    """Whether ``name`` is Hugging Face's name of the output embedding."""
    return name == "lm_head.weight" or name.endswith(".lm_head.weight")


def _read_safetensors_header(file: Path) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of one ``.safetensors`` file.

    Raises:
        ConfigError: the file is truncated or a Git LFS pointer, or has a dtype that this torch doesn't know.
    """
    specs = {}
    for name, entry in read_safetensors_header(file, _MAX_HEADER_BYTES).items():
        if name == "__metadata__":
            continue
        dtype = getattr(torch, _DTYPES.get(entry["dtype"], ""), None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"{file}: tensor {name!r} has dtype {entry['dtype']}, which this torch can't represent")
        specs[name] = TensorSpec(name=name, shape=tuple(entry["shape"]), dtype=dtype)
    return specs


_NO_CHECKPOINT = (
    "The server's tensor names are read from its checkpoint: make the same files readable here, or describe them with "
    "Checkpoint.from_specs(...)."
)


def weight_files(folder: Path, *, purpose: str = "tensor names are read from safetensors headers") -> list[Path]:
    """The files that a server would load: those that the index names; without an index, all model files.

    Args:
        folder: a checkpoint.
        purpose: what needs safetensors files, for the error.

    Raises:
        ConfigError: it has no safetensors files, or lacks some that its index names.
    """
    if (folder / _INDEX).is_file():
        files = sorted({folder / file for file in _read_json(folder / _INDEX)["weight_map"].values()})
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ConfigError(f"{folder} lacks {len(absent)} of the files its index names, e.g. {absent[0]}")
        return files
    files = sorted(folder.glob("*.safetensors"))
    # The folder may also hold adapters, and Mistral's second copy of the model under other names ("consolidated").
    files = [file for file in files if not file.name.startswith("adapter_")]
    model_files = [file for file in files if not file.name.startswith("consolidated")]
    files = model_files or files
    if not files:
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")) + sorted(folder.glob("*.pth"))
        what = f"only {pickled[0].name}" if pickled else "no weight files"
        raise ConfigError(
            f"{folder} holds {what}: {purpose}. Convert it with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), or describe it with "
            "Checkpoint.from_specs(...)."
        )
    return files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} should hold a JSON object")
    return content


def _is_tied(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether input and output embedding are one tensor.

    Config files leave out values that are their class's default. If the config doesn't tell, a checkpoint without an
    output embedding is tied.
    """
    text_config = config.get("text_config")
    for section in (config, text_config if isinstance(text_config, dict) else {}):
        if "tie_word_embeddings" in section:
            return bool(section["tie_word_embeddings"])
    return not any(is_output_embedding(name) for name in names)


def _quantization(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> str | None:
    declared = config.get("quantization_config") or config.get("compression_config")
    if isinstance(declared, dict):
        return str(declared.get("quant_method") or declared.get("quant_algo") or "unnamed")
    narrow = next(
        (spec.dtype for spec in specs.values() if spec.dtype.is_floating_point and spec.dtype.itemsize < 2), None
    )
    return str(narrow).removeprefix("torch.") if narrow else None
