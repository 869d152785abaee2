"""What can be set, as frozen keyword-only records that check themselves when they are made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from torchrl_sglang.errors import ConfigError

__all__ = ["ClientConfig", "SamplingParams", "ServerConfig", "SyncConfig", "nearest_name"]


def nearest_name(name: str, known: Sequence[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of ``known``, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(config: object, *names: str, zero: bool = False) -> None:
    """Each of the fields that is not ``None`` must be a finite number above 0 (or 0 itself, with ``zero``)."""
    for name in names:
        value = getattr(config, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        _require(
            value is None or (is_number and (value > 0 or (zero and value == 0))),
            f"{name} must be {'at least 0' if zero else 'positive'}, got {value!r}",
        )


def _words(name: str, value: Sequence[str]) -> tuple[str, ...]:
    # A plain string is a sequence too, of its letters.
    _require(not isinstance(value, str), f"{name} must be a sequence of strings, got the string {value!r}")
    return tuple(str(word) for word in value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Field names are SGLang's; :meth:`from_kwargs` takes the other ecosystems' names too.

    Source: SGLang's ``/generate`` ``sampling_params`` (0.5.23).

    Examples:
        >>> SamplingParams.from_kwargs(max_tokens=16, do_sample=False).to_wire()
        {'max_new_tokens': 16, 'temperature': 0.0}
        >>> SamplingParams.from_kwargs(temprature=0.5)
        Traceback (most recent call last):
        ...
        torchrl_sglang.errors.ConfigError: unknown generation argument 'temprature'. Did you mean 'temperature'?
    """

    max_new_tokens: int = 128
    """Most tokens to generate per sequence; 0 generates none (scoring)."""
    min_new_tokens: int = 0
    """EOS and stop tokens are suppressed until this many tokens exist."""
    n: int = 1
    """Sequences per prompt; answers come prompt by prompt."""
    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: keep the smallest set of tokens with at least this probability."""
    top_k: int = -1
    """Keep the k most likely tokens; -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit per earlier occurrence in the response."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of a token that already occurred."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, when negative) the logits of tokens already seen; 1 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; trimmed from the text, their tokens stay in the ids."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response, besides EOS."""
    stop_regex: tuple[str, ...] = ()
    """Regular expressions that end a response."""
    ignore_eos: bool = False
    """Go on after EOS, up to ``max_new_tokens``."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the decoded text (never out of the ids)."""
    spaces_between_special_tokens: bool = True
    """Put spaces between special tokens in the decoded text."""
    no_stop_trim: bool = False
    """Keep the stop string or token in the decoded text."""
    regex: str | None = None
    """Constrain the response to a regular expression (needs a grammar backend)."""
    json_schema: str | None = None
    """Constrain the response to a JSON schema given as JSON text (needs a grammar backend)."""
    ebnf: str | None = None
    """Constrain the response to an EBNF grammar (needs a grammar backend)."""
    structural_tag: str | None = None
    """Constrain tagged parts of the response (needs a grammar backend)."""
    logit_bias: Mapping[str, float] | None = None
    """Added to the logits of these token ids (ids as strings, as JSON wants them)."""
    sampling_seed: int | None = None
    """Seed of this request. SGLang honours it only under ``--enable-deterministic-inference``."""
    custom_params: Mapping[str, Any] | None = None
    """Passed to a custom logit processor."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "stop_regex"):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, ())
            elif isinstance(value, (str, int)):
                object.__setattr__(self, name, (value,))
            else:
                object.__setattr__(self, name, tuple(value))
        _require(
            all(isinstance(text, str) and text for text in (*self.stop, *self.stop_regex)),
            f"stop and stop_regex must be non-empty strings, got stop={self.stop!r}, stop_regex={self.stop_regex!r}",
        )
        _require(
            all(isinstance(token, int) and token >= 0 for token in self.stop_token_ids),
            f"stop_token_ids must be token ids, got {self.stop_token_ids!r}",
        )
        for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"):
            value = getattr(self, name)
            _require(
                isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
                f"{name} must be a finite number, got {value!r}",
            )
        for name in ("max_new_tokens", "min_new_tokens", "n", "top_k"):
            value = getattr(self, name)
            _require(isinstance(value, int) and not isinstance(value, bool), f"{name} must be an int, got {value!r}")
        _require(self.max_new_tokens >= 0, f"max_new_tokens must be at least 0, got {self.max_new_tokens}")
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must be between 0 and max_new_tokens={self.max_new_tokens}, got {self.min_new_tokens}",
        )
        _require(self.n >= 1, f"n must be at least 1, got {self.n}")
        _require(self.temperature >= 0, f"temperature must be at least 0, got {self.temperature}")
        _require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        _require(self.top_k == -1 or self.top_k >= 1, f"top_k must be -1 (all tokens) or at least 1, got {self.top_k}")
        _require(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}")
        for name in ("frequency_penalty", "presence_penalty"):
            _require(-2 <= getattr(self, name) <= 2, f"{name} must be in [-2, 2], got {getattr(self, name)}")
        _require(
            0 < self.repetition_penalty <= 2, f"repetition_penalty must be in (0, 2], got {self.repetition_penalty}"
        )
        grammars = [name for name in ("regex", "json_schema", "ebnf", "structural_tag") if getattr(self, name)]
        _require(len(grammars) <= 1, f"only one grammar can constrain a response, got {' and '.join(grammars)}")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> SamplingParams:
        """Build from any mix of SGLang's, Hugging Face's, vLLM's and TorchRL's argument names.

        Translated: ``max_tokens`` (max_new_tokens), ``min_tokens`` (min_new_tokens), ``num_return_sequences`` (n),
        ``stop_sequences`` and ``stop_strings`` (stop), ``eos_token_id`` (stop_token_ids), ``seed`` (sampling_seed),
        ``do_sample=False`` (temperature 0), ``include_stop_str_in_output`` (no_stop_trim), ``top_k=0`` (-1).
        Where an old and a standard name are both given, the old one wins, as in TorchRL's wrappers.

        Raises:
            ConfigError: an unknown name (the nearest valid one is offered), a beam-search argument, or a bad value.
        """
        return cls(**cls._translate(kwargs))

    def updated(self, **kwargs: Any) -> SamplingParams:
        """These settings with some replaced, in any of the names :meth:`from_kwargs` takes.

        Examples:
            >>> SamplingParams(max_new_tokens=16, top_p=0.9).updated(max_tokens=4).to_wire()
            {'max_new_tokens': 4, 'top_p': 0.9}
        """
        return replace(self, **self._translate(kwargs))

    @classmethod
    def _translate(cls, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in kwargs.items() if value is not None}
        for old, name in _ALIASES.items():
            if old in given:
                given[name] = given.pop(old)
        for name, neutral in _BEAM_SEARCH.items():
            value = given.pop(name, neutral)
            _require(value == neutral, f"SGLang has no beam search: {name}={value!r} can't be honoured; remove it")
        do_sample = given.pop("do_sample", True)
        if not do_sample:
            _require(
                given.get("temperature", 0) == 0,
                f"do_sample=False is greedy decoding, but temperature={given.get('temperature')} was given: remove one",
            )
            given["temperature"] = 0.0
        if given.get("top_k") == 0:
            given["top_k"] = -1
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                hint = nearest_name(name, [*known, *_ALIASES, "do_sample"])
                raise ConfigError(f"unknown generation argument {name!r}.{hint}")
        return given

    @property
    def truncates(self) -> bool:
        """Whether top-p, top-k or min-p cut the distribution that tokens are drawn from."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k != -1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        """Whether penalties or a logit bias change the distribution that tokens are drawn from."""
        return bool(
            self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0 or self.logit_bias
        )

    def to_wire(self) -> dict[str, Any]:
        """The JSON object SGLang reads: what differs from SGLang's own defaults, and ``max_new_tokens`` always."""
        wire: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "max_new_tokens" and value != f.default:
                wire[f.name] = list(value) if isinstance(value, tuple) else value
        return wire


_ALIASES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "num_return_sequences": "n",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "seed": "sampling_seed",
    "include_stop_str_in_output": "no_stop_trim",
}
_BEAM_SEARCH = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How servers are talked to."""

    api_key: str | None = field(default=None, repr=False)
    """The server's ``--api-key``; sent on every call."""
    admin_api_key: str | None = field(default=None, repr=False)
    """The server's ``--admin-api-key``; sent on control calls (pause, update, flush...) in place of ``api_key``."""
    ca_certificate: str | None = None
    """CA bundle for ``https://`` servers with a private certificate authority; ``None`` uses the system's."""
    connect_timeout_s: float = 5.0
    """To open a connection. A server that runs accepts at once, even under load."""
    probe_timeout_s: float = 10.0
    """For answers that touch no model (`/ready`, `/model_info`); long enough for a busy machine."""
    control_timeout_s: float = 60.0
    """For pause, flush and group calls, which wait for the scheduler to come round."""
    generate_timeout_s: float = 1800.0
    """For one batch of generations; the whole batch is one request, so this bounds the slowest sequence."""
    update_timeout_s: float = 300.0
    """For one bucket of a weight update (broadcast and load)."""
    max_connections: int = 32
    """Most connections kept open per server; more threads than this wait for a free one."""
    connect_retries: int = 2
    """How often a request that never reached the server is sent again."""
    unchecked_vocab: bool = False
    """Allow generation though the vocabulary size is unknown. An unknown id kills a server, so the default refuses."""
    vocab_size: int | None = None
    """Number of valid token ids, for servers whose checkpoint path can't be read from here."""

    def __post_init__(self) -> None:
        _require_positive(self, *(f.name for f in fields(self) if f.name.endswith("_timeout_s")))
        _require(self.max_connections >= 1, f"max_connections must be at least 1, got {self.max_connections}")
        _require(self.connect_retries >= 0, f"connect_retries must be at least 0, got {self.connect_retries}")
        _require(self.vocab_size is None or self.vocab_size > 0, f"vocab_size must be positive, got {self.vocab_size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How one SGLang server process is launched. Everything not named here goes into ``extra_args``."""

    model: str
    """Path or hub name of the checkpoint to serve."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto`` serves on a GPU when one is visible, else on SGLang's CPU engine."""
    python: str | None = None
    """Python that has SGLang installed; ``None`` is this one. SGLang pins its own torch, so it is often another."""
    host: str = "127.0.0.1"
    """Address to listen on; loopback unless other machines must reach it."""
    port: int | None = None
    """Port to listen on; ``None`` picks a free one."""
    tp_size: int = 1
    """Tensor-parallel ranks."""
    gpus: tuple[int, ...] | None = None
    """GPUs of this server, as the launching process numbers them; ``None`` takes the first ``tp_size``."""
    dtype: str | None = None
    """SGLang's ``--dtype``; ``None`` is the checkpoint's on a GPU and float32 on a CPU."""
    context_length: int | None = None
    """Longest prompt plus response, in tokens; ``None`` is the checkpoint's."""
    mem_fraction_static: float | None = None
    """Fraction of the GPU's memory for weights and KV cache; ``None`` is SGLang's own (0.3 on a CPU)."""
    max_total_tokens: int | None = None
    """Size of the KV cache in tokens; ``None`` is SGLang's own (8192 on a CPU)."""
    api_key: str | None = field(default=None, repr=False)
    """Key that every call has to carry."""
    admin_api_key: str | None = field(default=None, repr=False)
    """Key that control calls have to carry."""
    extra_args: tuple[str, ...] = ()
    """More SGLang command-line words, appended as they are; the last of a repeated flag wins."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the child process, on top of ours; ours is never changed."""
    start_timeout_s: float = 600.0
    """From launch to ready; a large checkpoint on a network disk takes minutes."""
    stop_timeout_s: float = 10.0
    """From SIGTERM to SIGKILL. SGLang takes 6-9 s to stop by itself."""
    log_dir: Path | None = None
    """Where the server's log goes; ``None`` is a temporary folder, removed after a clean stop, kept after a failure."""

    def __post_init__(self) -> None:
        _require(bool(self.model), "model must be the path or hub name of a checkpoint")
        _require(self.tp_size >= 1, f"tp_size must be at least 1, got {self.tp_size}")
        _require(self.device in ("auto", "cuda", "cpu"), f"device must be 'auto', 'cuda' or 'cpu', got {self.device!r}")
        _require(self.port is None or 0 < self.port < 65536, f"port must be in 1..65535, got {self.port}")
        _require(
            self.gpus is None or len(self.gpus) == self.tp_size,
            f"gpus must name tp_size={self.tp_size} GPUs, got {self.gpus}",
        )
        _require_positive(self, "start_timeout_s", "mem_fraction_static", "context_length", "max_total_tokens")
        _require_positive(self, "stop_timeout_s", zero=True)
        _require(
            self.mem_fraction_static is None or self.mem_fraction_static < 1,
            f"mem_fraction_static is a fraction below 1, got {self.mem_fraction_static}",
        )
        object.__setattr__(self, "extra_args", _words("extra_args", self.extra_args))
        # The words of a command line are for everyone on the machine to see, and part of our own repr.
        for key in ("api_key", "admin_api_key"):
            flag = "--" + key.replace("_", "-")
            _require(
                not any(word.split("=")[0] == flag for word in self.extra_args),
                f"{flag} does not belong into extra_args: use {key}=",
            )
        for name, value in self.env.items():
            _require(isinstance(value, str), f"env[{name!r}] must be a string, got {value!r}")
        if self.log_dir is not None:
            object.__setattr__(self, "log_dir", Path(self.log_dir))


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncConfig:
    """How weights reach the servers."""

    road: Literal["auto", "broadcast", "disk", "lora"] = "auto"
    """``broadcast``: a process group over all servers; ``disk``: a folder all can read; ``lora``: the adapter only."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Collective library: ``auto`` is NCCL when the servers run on GPUs, else gloo."""
    packing: Literal["flattened", "tensors"] = "flattened"
    """One collective per bucket of concatenated bytes, or one per tensor."""
    groups: Literal["shared", "per_server"] = "shared"
    """One process group for all servers, or one each: isolates faults at N times the trainer's egress."""
    bucket_bytes: int = 64 * 2**20
    """Most bytes per bucket; a single larger tensor gets a bucket of its own."""
    pause: Literal["auto", "abort", "retract", "in_place"] = "auto"
    """What happens to requests in flight: ``auto`` is ``abort`` when there are none, else ``retract``."""
    cache: Literal["flush", "salt", "keep"] = "flush"
    """``flush`` empties the prefix caches; ``salt`` leaves them and gives requests made through this pool a name-space
    per version (what ``flush`` becomes under ``in_place``); ``keep`` serves stale KV, to study staleness only."""
    verify: Literal["off", "probe", "full"] = "probe"
    """``probe`` scores one fixed prompt on every server after a sync; ``full`` compares the servers' checksums too."""
    verify_atol: float | None = None
    """Largest log-prob difference the proof accepts; ``None`` is 1e-3 for float32 and 0.5 for half precision."""
    name_map: Mapping[str, str] = field(default_factory=dict)
    """Trainer's tensor name to checkpoint name, for custom models; applied before every check."""
    ignore: tuple[str, ...] = ()
    """Names (``fnmatch`` patterns) that are neither required from the trainer nor sent."""
    blocking: bool = True
    """Whether a collector's update waits until the servers have the weights. If not, the next rollout may start, and
    an error is raised by the next update; the trainer has to leave the parameters alone until then."""
    only_trainable: bool = False
    """After the first full sync, send only parameters with ``requires_grad``."""
    check_values: bool = True
    """Refuse tensors that hold NaN or infinity."""
    master_address: str | None = None
    """Address of the trainer as the servers reach it; ``None`` is the address of the interface that reaches them."""
    master_port: int | None = None
    """Port of the rendezvous store; ``None`` picks a free one."""
    group_timeout_s: float = 60.0
    """To form the process group, and for the first bucket (NCCL makes its communicator there)."""
    bucket_timeout_s: float = 60.0
    """Longest one bucket may take on its way. A collective that hangs can be given up only after this time (gloo)."""
    fixed_timeout_s: float = 60.0
    """Fixed part of a sync's deadline."""
    assumed_bytes_per_s: float = 100e6
    """Slowest transfer to expect; a sync's deadline is ``fixed_timeout_s + bytes / assumed_bytes_per_s``."""
    disk_dir: Path | None = None
    """Folder that trainer and servers share, for ``road="disk"``."""

    def __post_init__(self) -> None:
        for name, allowed in _SYNC_CHOICES.items():
            value = getattr(self, name)
            _require(value in allowed, f"{name} must be one of {allowed}, got {value!r}")
        _require_positive(
            self, "bucket_bytes", "group_timeout_s", "fixed_timeout_s", "assumed_bytes_per_s", "verify_atol"
        )
        _require(
            self.master_port is None or 0 < self.master_port < 65536,
            f"master_port must be in 1..65535, got {self.master_port}",
        )
        object.__setattr__(self, "ignore", _words("ignore", self.ignore))
        if self.disk_dir is not None:
            object.__setattr__(self, "disk_dir", Path(self.disk_dir))
        _require(self.road != "disk" or self.disk_dir is not None, "road='disk' needs disk_dir, a folder all can read")

    def deadline_s(self, num_bytes: int) -> float:
        """Seconds a sync of ``num_bytes`` may take before it counts as failed."""
        return self.fixed_timeout_s + num_bytes / self.assumed_bytes_per_s


_SYNC_CHOICES: dict[str, tuple[str, ...]] = {
    "road": ("auto", "broadcast", "disk", "lora"),
    "backend": ("auto", "gloo", "nccl"),
    "packing": ("flattened", "tensors"),
    "groups": ("shared", "per_server"),
    "pause": ("auto", "abort", "retract", "in_place"),
    "cache": ("flush", "salt", "keep"),
    "verify": ("off", "probe", "full"),
}
