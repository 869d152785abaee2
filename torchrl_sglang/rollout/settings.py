"""The settings of a policy: its constructor's arguments, checked, and the values that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from tensordict import NestedKey

from torchrl_sglang.chat_templates import check_template_kwargs
from torchrl_sglang.config import SamplingParams, ServerConfig
from torchrl_sglang.config.checking import require_numbers
from torchrl_sglang.config.foreign_names import (
    ENGINE_ARGUMENTS,
    GENERATION_ARGUMENTS,
    POLICY_ARGUMENTS,
    unknown_argument,
)
from torchrl_sglang.errors import ConfigError

__all__ = ["RolloutSettings"]

InputMode = Literal["history", "text", "tokens"]

# The policy needs these values of the tokenizer's arguments: a caller may repeat them but not change them.
_TOKENIZER_FIXED = {
    "return_attention_mask": (True,),
    "padding_side": ("left",),
    "padding": (True, False),
    "return_overflowing_tokens": (False,),
}

# How responses are decoded; the names of one line mean the same.
_DECODING_NAMES = ({"skip_special_tokens"}, {"include_stop_str_in_output", "no_stop_trim"})
_DECODING = [name for names in _DECODING_NAMES for name in names]

# Where arguments belong that are not the policy's.
_ELSEWHERE = {
    "generate_kwargs={{{name!r}: ...}}": [
        *(f.name for f in fields(SamplingParams)),
        *("max_tokens", "min_tokens", "do_sample", "logprobs", "prompt_logprobs", *GENERATION_ARGUMENTS),
    ],
    "AsyncSGLang.from_pretrained(...), which makes the servers": [
        *(f.name for f in fields(ServerConfig)),
        *("dp_size", "max_model_len", "gpu_memory_utilization", "tensor_parallel_size", *ENGINE_ARGUMENTS),
    ],
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """The keyword arguments of :class:`~torchrl_sglang.SGLangWrapper`, under their names; documented there."""

    tokenizer: Any | str | None = None
    input_mode: InputMode = "history"
    input_key: NestedKey | None = None
    attention_mask_key: NestedKey = "attention_mask"
    generate: bool = True
    generate_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pad_output: bool = False
    pad_model_input: bool | None = None
    inplace: Literal[True, False, "empty"] | None = None
    device: torch.device | str | int | None = None
    layout: torch.layout | None = None
    num_samples: int | None = None
    chat_template_name: str | None = None
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    return_log_probs: bool | None = None
    history_key: NestedKey = "history"
    text_key: NestedKey = "text"
    tokens_key: NestedKey = "tokens"
    masks_key: NestedKey = "masks"
    log_probs_key: NestedKey = "log_probs"
    generation_key: NestedKey | None = "generation"
    policy_version_key: NestedKey | None = None
    batching: bool | None = None
    min_batch_size: int | None = None
    max_batch_size: int | None = None
    batching_timeout: float = 10.0
    prefer_tokens: Literal[True, False, "always"] = False
    on_overlong: Literal["raise", "truncate_left"] = "raise"
    on_error: Literal["raise", "mask"] = "raise"
    progress: bool = False
    max_resumes: int = 8
    exact_log_probs: bool = False

    def __post_init__(self) -> None:
        for name in ("generate_kwargs", "tokenizer_kwargs"):  # copies: the caller may change its own later
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        object.__setattr__(self, "template_kwargs", check_template_kwargs(self.template_kwargs))
        for name, allowed in (
            ("input_mode", get_args(InputMode)),
            ("on_overlong", ("raise", "truncate_left")),
            ("on_error", ("raise", "mask")),
            ("inplace", (None, True, False, "empty")),
            ("prefer_tokens", (True, False, "always")),
        ):
            value = getattr(self, name)
            _require(value in allowed, f"{name} must be one of {allowed}, got {value!r}")
            object.__setattr__(self, name, allowed[allowed.index(value)])  # True for 1
        for name in ("generate", "pad_output", "progress", "exact_log_probs"):
            _require(isinstance(getattr(self, name), bool), f"{name} must be a boolean, got {getattr(self, name)!r}")
        _require(self.pad_model_input is None, "pad_model_input is not supported: servers take ragged input; remove it")
        _require(
            self.layout in (None, torch.strided),
            f"layout={self.layout} is not supported: ragged output is one strided tensor per sequence; "
            "td.get(key, as_nested_tensor=True, layout=torch.jagged) gives a nested tensor of it",
        )
        require_numbers(self, "max_resumes", at_least=0)
        _require(
            self.return_log_probs is not False or self.generate, "return_log_probs must be True when generate=False."
        )
        _require(
            self.policy_version_key is None or self.generation_key is not None,
            "policy_version_key needs a generation_key: the version is read from the Generation",
        )
        _require(
            self.chat_template is None or self.chat_template_name is None,
            "chat_template and chat_template_name are two ways to choose the chat template: give one",
        )
        self._check_batching()
        self._check_tokenizer_kwargs()
        # each raises if it contradicts
        _ = self.sampling, self.samples, self.writes_log_probs, self.writes_prompt_log_probs, self.writes_inplace

    def _check_batching(self) -> None:
        sizes = (self.min_batch_size, self.max_batch_size)
        _require(
            self.batching is not False or sizes == (None, None),
            "min_batch_size and max_batch_size must be None if batching is False.",
        )
        require_numbers(self, "min_batch_size", "max_batch_size", "num_samples", at_least=1)
        if self.min_batch_size is not None and self.max_batch_size is not None:
            _require(
                self.min_batch_size <= self.max_batch_size,
                f"min_batch_size ({self.min_batch_size}) must be <= max_batch_size ({self.max_batch_size})",
            )
        require_numbers(self, "batching_timeout", above=0, at_most=1e9)

    def _check_tokenizer_kwargs(self) -> None:
        for name, allowed in _TOKENIZER_FIXED.items():
            value = self.tokenizer_kwargs.get(name, allowed[0])
            _require(value in allowed, f"tokenizer_kwargs[{name!r}] must be {allowed[0]}, got {value!r}")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> RolloutSettings:
        """Build from keyword arguments.

        Raises:
            ConfigError: an unknown name (the nearest valid one is offered) or a bad value.
        """
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            hint = unknown_argument(name, known, foreign=POLICY_ARGUMENTS, elsewhere=_ELSEWHERE)
            _require(name in known, f"unknown argument {name!r}.{hint}")
        return cls(**kwargs)

    def changed(self, **kwargs: Any) -> RolloutSettings:
        """These settings with some replaced. With another mode, ``input_key`` is reset unless it is given too."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if any(kwargs.get(name, values[name]) != values[name] for name in ("input_mode", "generate")):
            values["input_key"] = None
        if kwargs.get("generate") is False:
            values["return_log_probs"] = None
        return self.from_kwargs(**{**values, **kwargs})

    # ------------------------------------------------------------------ derived values

    @property
    def source_key(self) -> NestedKey:
        """Where the input is."""
        if self.input_key is not None:
            return self.input_key
        return (self.input_mode, "prompt" if self.generate else "full")

    @property
    def out_keys(self) -> list[NestedKey]:
        """The declared entries: vLLMWrapper's, in its order, and ``policy_version_key`` if set."""
        keys = [self.text_key] if self.writes_text else []
        keys += [self.masks_key, self.tokens_key]
        if self.writes_log_probs:
            keys.append(self.log_probs_key)
        if self.writes_history:
            keys.append(self.history_key)
        if self.generate and self.policy_version_key is not None:
            keys.append(self.policy_version_key)
        return keys

    @property
    def undeclared_keys(self) -> list[NestedKey]:
        """The entries that the policy writes beside ``out_keys``."""
        return [self.generation_key] if self.generate and self.generation_key is not None else []

    @property
    def writes_text(self) -> bool:
        """Whether ``Text`` is written."""
        return self.input_mode != "tokens"

    @property
    def writes_history(self) -> bool:
        """Whether ``ChatHistory`` is written."""
        return self.input_mode == "history"

    @property
    def _own_kwargs(self) -> dict[str, Any]:
        """The generation arguments that say what is reported, not how tokens are drawn."""
        return {k: v for k, v in self.generate_kwargs.items() if k in ("logprobs", "prompt_logprobs")}

    @property
    def writes_log_probs(self) -> bool:
        """Whether log-probs are written."""
        wanted = self._wants("logprobs")
        if wanted is not None and self.generate and self.return_log_probs is not None:
            _require(
                bool(wanted) == self.return_log_probs,
                f"generate_kwargs['logprobs']={wanted!r} contradicts return_log_probs={self.return_log_probs}",
            )
        if not self.generate:
            return True
        if self.return_log_probs is not None:
            return self.return_log_probs
        return True if wanted is None else bool(wanted)

    @property
    def writes_prompt_log_probs(self) -> bool:
        """Whether the log-probs of the prompt are written while generating."""
        return bool(self._wants("prompt_logprobs")) and self.writes_log_probs

    def _wants(self, name: str) -> bool | None:
        """One of the arguments of :attr:`_own_kwargs`; ``None`` if it isn't given."""
        wanted = self._own_kwargs.get(name)
        _require(
            wanted is None or wanted in (0, 1),
            f"{name}={wanted!r}: only the log-prob of the chosen token is returned; use {name}=True",
        )
        return None if wanted is None else bool(wanted)

    @cached_property
    def sampling(self) -> SamplingParams:
        """How tokens are drawn; ``n`` is the number of samples."""
        given = {k: v for k, v in self.generate_kwargs.items() if k not in self._own_kwargs}
        sampling = SamplingParams.from_kwargs(**given)
        if self.num_samples is not None:
            is_given = any(given.get(name) is not None for name in ("n", "num_return_sequences"))
            _require(
                sampling.n == self.num_samples or not is_given,
                f"num_samples={self.num_samples} differs from generate_kwargs['n']={sampling.n}.",
            )
            sampling = sampling.updated(n=self.num_samples)
        return sampling

    @property
    def samples(self) -> int | None:
        """Size of the sample dimension; ``None`` when there is none."""
        if not self.generate:
            return None
        return self.sampling.n if self.sampling.n > 1 or self.num_samples is not None else None

    @property
    def writes_inplace(self) -> Literal[True, False, "empty"]:
        """``inplace`` with its default: in place, unless several samples need another batch dimension."""
        if self.samples is None:
            return True if self.inplace is None else self.inplace
        _require(not self.inplace, "inplace must be False (or None) when generating more than one sample.")
        return False

    @property
    def text_kwargs(self) -> dict[str, Any]:
        """The tokenizer's arguments in text mode; the outputs are padded and made tensors later."""
        return {k: v for k, v in self.tokenizer_kwargs.items() if k not in (*_TOKENIZER_FIXED, "return_tensors")}

    @property
    def min_batch(self) -> int | None:
        """Prompts that a batch of several calls waits for; ``None`` when calls are not merged."""
        if self.min_batch_size is None and (self.batching or self.max_batch_size is not None):
            return 1
        return self.min_batch_size

    @property
    def merges_calls(self) -> bool:
        """Whether calls of several threads share requests."""
        return self.min_batch is not None

    def with_decoding(self, call: Mapping[str, Any]) -> RolloutSettings:
        """These settings with the decoding arguments of one call."""
        given = {name: call[name] for name in _DECODING if call.get(name) is not None}
        if not given:
            return self
        replaced = [name for names in _DECODING_NAMES if given.keys() & names for name in names]
        kept = {name: value for name, value in self.generate_kwargs.items() if name not in replaced}
        return replace(self, generate_kwargs={**kept, **given})

    def decoding(self, name: str) -> Any:
        """A decoding argument as the caller gave it, else ``None``."""
        return self.generate_kwargs.get(name)
