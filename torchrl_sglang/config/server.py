"""Settings of a launched server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchrl_sglang.config.api_keys import check_keys
from torchrl_sglang.config.checking import as_path, names_checked, require, require_number, require_numbers, words
from torchrl_sglang.config.foreign_names import ENGINE_ARGUMENTS, unknown_argument

__all__ = ["ServerConfig"]


@names_checked(lambda name, known: unknown_argument(name, known, foreign=ENGINE_ARGUMENTS))
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How one SGLang server process is launched. SGLang's other flags go into ``extra_args``."""

    model: str
    """Path or hub name of the checkpoint to serve."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto`` uses a GPU if one is visible, else SGLang's CPU engine."""
    python: str | None = None
    """Python that has SGLang installed. ``None``: the current one if it has SGLang with what SGLang needs; else, for a
    server without a GPU, that of ``torchrl-sglang install-cpu-server``."""
    host: str = "127.0.0.1"
    """Address to listen on; the default, loopback, is not reachable from other machines."""
    port: int | None = None
    """Port to listen on; ``None`` picks a free one."""
    tp_size: int = 1
    """Tensor-parallel ranks."""
    gpus: tuple[int, ...] | None = None
    """GPUs of this server, as numbered in the launching process; ``None`` takes the first ``tp_size``."""
    dtype: str | None = None
    """SGLang's ``--dtype``; ``None`` is float32 on a CPU, and on a GPU SGLang's own choice: the checkpoint's, but
    float16 for a float32 one."""
    context_length: int | None = None
    """Longest prompt plus response, in tokens; ``None`` is the checkpoint's."""
    mem_fraction_static: float | None = None
    """Fraction of the GPU's memory for weights and KV cache; ``None`` is SGLang's own (0.9 on a CPU)."""
    max_total_tokens: int | None = None
    """Size of the KV cache in tokens; ``None`` is SGLang's own (8192 on a CPU)."""
    api_key: str | Literal[False] | None = field(default=None, repr=False)
    """Key that every request must have. ``None``: :class:`AsyncSGLang` and ``launch_on_ray`` make a random one
    (:attr:`AsyncSGLang.api_key`); a plain :class:`SGLangServer` needs none, and so listens on loopback only. ``False``:
    no key, for everyone who reaches ``host``; they can load any weights that the server can read."""
    api_key_file: str | Path | None = field(default=None, repr=False)
    """File with ``api_key``, read when this record is made; the record then holds the key."""
    admin_api_key: str | None = field(default=None, repr=False)
    """Key that control calls must have, instead of ``api_key``. Not without ``api_key``: SGLang then serves everyone,
    and shows this key to everyone (0.5.23)."""
    admin_api_key_file: str | Path | None = field(default=None, repr=False)
    """File with ``admin_api_key``."""
    extra_args: tuple[str, ...] = ()
    """More SGLang command-line words, appended as they are; the last of a repeated flag wins."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment variables of the server process. They override inherited ones; this process's stay unchanged."""
    start_timeout_s: float = 600.0
    """From launch to ready, besides a second per 200 MB of a checkpoint that is a folder here."""
    stop_timeout_s: float = 10.0
    """From SIGTERM to SIGKILL. SGLang takes 6-9 s to end after SIGTERM."""
    log_dir: Path | None = None
    """Folder of the server's log; ``None`` is a temporary folder, removed after a clean stop, kept after a failure."""

    def __post_init__(self) -> None:
        given: object = self.model
        if isinstance(given, Path):
            object.__setattr__(self, "model", str(given))
        require(
            isinstance(self.model, str) and bool(self.model),
            f"model must be the path or hub name of a checkpoint, got {self.model!r}",
        )
        require_numbers(self, "tp_size", "context_length", "max_total_tokens", at_least=1)
        require(self.device in ("auto", "cuda", "cpu"), f"device must be 'auto', 'cuda' or 'cpu', got {self.device!r}")
        require_numbers(self, "port", at_least=1, at_most=65535)
        is_sequence = isinstance(self.gpus, Sequence) and not isinstance(self.gpus, (str, bytes))
        require(self.gpus is None or is_sequence, f"gpus must be a sequence of numbers, got {self.gpus!r}")
        for gpu in self.gpus or ():
            require_number("a GPU's number in gpus", gpu, whole=True, at_least=0)
        require(
            self.gpus is None or len(self.gpus) == self.tp_size,
            f"gpus must name tp_size={self.tp_size} GPUs, got {self.gpus}",
        )
        require_numbers(self, "start_timeout_s", above=0)
        require_numbers(self, "stop_timeout_s", at_least=0)
        require_numbers(self, "mem_fraction_static", above=0, below=1)
        object.__setattr__(self, "extra_args", words("extra_args", self.extra_args))
        # Everyone on the machine can read a command line, and extra_args are part of the repr.
        for key in ("api_key", "admin_api_key"):
            flag = "--" + key.replace("_", "-")
            require(
                not any(len(word) > 4 and flag.startswith(word.split("=")[0]) for word in self.extra_args),
                f"{flag} must not be in extra_args: use {key}=",
            )
        check_keys(self, may_be_open=True)
        require(
            self.admin_api_key is None or isinstance(self.api_key, str),
            "admin_api_key without api_key: SGLang then serves everyone, and shows the admin key to everyone. Give an "
            "api_key too",
        )
        require(isinstance(self.env, Mapping), f"env must map names to values, got a {type(self.env).__name__}")
        for name, value in self.env.items():
            require(isinstance(value, str), f"env[{name!r}] must be a string, got {value!r}")
        if self.log_dir is not None:
            object.__setattr__(self, "log_dir", as_path("log_dir", self.log_dir))
