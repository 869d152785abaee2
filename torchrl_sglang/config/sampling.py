"""Settings of sampling, and the names that other libraries use for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torchrl_sglang.config.checking import names_checked, require
from torchrl_sglang.config.foreign_names import GENERATION_ARGUMENTS, unknown_argument
from torchrl_sglang.errors import ConfigError

__all__ = ["SamplingParams"]


def _other_name(name: str, known: Sequence[str]) -> str:
    if name in _ALIASES:
        return f" It is called {_ALIASES[name]}; SamplingParams.from_kwargs(...) takes both names."
    return unknown_argument(name, known, foreign=GENERATION_ARGUMENTS)


@names_checked(_other_name)
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are sampled. Field names are SGLang's; :meth:`from_kwargs` takes other libraries' names too.

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
    """Most tokens per response; 0 generates none (scoring)."""
    min_new_tokens: int = 0
    """EOS and stop tokens are suppressed until the response has this many tokens."""
    n: int = 1
    """Responses per prompt; those of one prompt follow each other."""
    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: keep the smallest set of tokens with at least this probability."""
    top_k: int = -1
    """Keep the k most likely tokens; -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each earlier occurrence in the response."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that already occurred."""
    repetition_penalty: float = 1.0
    """Positive logits of earlier tokens are divided by it, negative ones multiplied; 1 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; removed from the text, while their tokens stay in the ids."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response, besides EOS."""
    stop_regex: tuple[str, ...] = ()
    """Regular expressions that end a response."""
    ignore_eos: bool = False
    """Continue after EOS, up to ``max_new_tokens``."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the decoded text; the ids keep them."""
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
    """Added to the logits of these token ids (ids as strings, as JSON requires)."""
    sampling_seed: int | None = None
    """Seed of this request. SGLang honours it only under ``--enable-deterministic-inference``."""
    custom_params: Mapping[str, Any] | None = None
    """Passed to a custom logit processor."""
    sampling_mask: bool = False
    """Return which tokens top-k, top-p and min-p kept, and the sampled token's log-prob among them. SGLang (0.5.23)
    does so only for ``1 < top_k <= 4096``."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "stop_regex"):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, ())
            elif isinstance(value, (str, int)):
                object.__setattr__(self, name, (value,))
            else:
                object.__setattr__(self, name, tuple(value))
        require(
            all(isinstance(text, str) and text for text in (*self.stop, *self.stop_regex)),
            f"stop and stop_regex must be non-empty strings, got stop={self.stop!r}, stop_regex={self.stop_regex!r}",
        )
        require(
            all(isinstance(token, int) and token >= 0 for token in self.stop_token_ids),
            f"stop_token_ids must be token ids, got {self.stop_token_ids!r}",
        )
        for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"):
            value = getattr(self, name)
            require(
                isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
                f"{name} must be a finite number, got {value!r}",
            )
        for name in ("max_new_tokens", "min_new_tokens", "n", "top_k"):
            value = getattr(self, name)
            require(isinstance(value, int) and not isinstance(value, bool), f"{name} must be an int, got {value!r}")
        require(self.max_new_tokens >= 0, f"max_new_tokens must be at least 0, got {self.max_new_tokens}")
        require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must be between 0 and max_new_tokens={self.max_new_tokens}, got {self.min_new_tokens}",
        )
        require(self.n >= 1, f"n must be at least 1, got {self.n}")
        require(self.temperature >= 0, f"temperature must be at least 0, got {self.temperature}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        require(self.top_k == -1 or self.top_k >= 1, f"top_k must be -1 (all tokens) or at least 1, got {self.top_k}")
        require(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}")
        for name in ("frequency_penalty", "presence_penalty"):
            require(-2 <= getattr(self, name) <= 2, f"{name} must be in [-2, 2], got {getattr(self, name)}")
        require(
            0 < self.repetition_penalty <= 2, f"repetition_penalty must be in (0, 2], got {self.repetition_penalty}"
        )
        grammars = [name for name in ("regex", "json_schema", "ebnf", "structural_tag") if getattr(self, name)]
        require(len(grammars) <= 1, f"only one grammar can constrain a response, got {' and '.join(grammars)}")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> SamplingParams:
        """Make from any mix of SGLang's, Hugging Face's, vLLM's and TorchRL's argument names.

        Translated: ``max_tokens`` (max_new_tokens), ``min_tokens`` (min_new_tokens), ``num_return_sequences`` (n),
        ``stop_sequences`` and ``stop_strings`` (stop), ``eos_token_id`` (stop_token_ids), ``seed`` (sampling_seed),
        ``do_sample=False`` (temperature 0), ``include_stop_str_in_output`` (no_stop_trim), ``top_k=0`` (-1).

        Raises:
            ConfigError: an unknown name (the error says what to write instead), two names of one argument with
                different values, a beam-search argument, or a bad value.
        """
        return cls(**cls._translate(kwargs))

    def updated(self, **kwargs: Any) -> SamplingParams:
        """These settings with some replaced, in any of the names :meth:`from_kwargs` takes.

        Examples:
            >>> SamplingParams(max_new_tokens=16, top_p=0.9).updated(max_tokens=4).to_wire()
            {'max_new_tokens': 4, 'top_p': 0.9}
        """
        require(
            not (kwargs.get("do_sample") and self.temperature == 0 and kwargs.get("temperature") is None),
            "do_sample=True samples, but these settings have temperature=0, which is greedy: give a temperature",
        )
        return replace(self, **self._translate(kwargs))

    @classmethod
    def _translate(cls, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in kwargs.items() if value is not None}
        given_as: dict[str, str] = {}
        for old in [old for old in given if old in _ALIASES]:
            name, value = _ALIASES[old], given.pop(old)
            if name in given and _same_form(name, given[name]) != _same_form(name, value):
                other = given_as.get(name, name)
                raise ConfigError(
                    f"{other}={given[name]!r} and {old}={value!r} are two names of one argument with different values: "
                    "give one"
                )
            given[name], given_as[name] = value, old
        for name, neutral in _BEAM_SEARCH.items():
            value = given.pop(name, neutral)
            require(value == neutral, f"SGLang has no beam search: {name}={value!r} can't be honoured; remove it")
        do_sample = given.pop("do_sample", None)
        require(
            not (do_sample and given.get("temperature") == 0),
            "do_sample=True samples, but temperature=0 is greedy decoding: remove one",
        )
        if do_sample is not None and not do_sample:
            require(
                given.get("temperature", 0) == 0,
                f"do_sample=False is greedy decoding, but temperature={given.get('temperature')} was given: remove one",
            )
            given["temperature"] = 0.0
        if given.get("top_k") == 0:
            given["top_k"] = -1
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                hint = unknown_argument(name, [*known, *_ALIASES, "do_sample"], foreign=GENERATION_ARGUMENTS)
                raise ConfigError(f"unknown generation argument {name!r}.{hint}")
        return given

    @property
    def truncates(self) -> bool:
        """Whether top-p, top-k or min-p truncate the distribution that tokens are sampled from."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k != -1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        """Whether penalties or a logit bias change the distribution that tokens are sampled from."""
        return bool(
            self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0 or self.logit_bias
        )

    def to_wire(self) -> dict[str, Any]:
        """SGLang's ``sampling_params``: fields that differ from SGLang's defaults, and always ``max_new_tokens``."""
        wire: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        for f in fields(self):
            value = getattr(self, f.name)
            # sampling_mask is a field of the request, beside sampling_params
            if f.name not in ("max_new_tokens", "sampling_mask") and value != f.default:
                wire[f.name] = list(value) if isinstance(value, tuple) else value
        return wire


def _same_form(name: str, value: Any) -> Any:
    """A value that compares equal to another one of the same meaning."""
    if name in ("stop", "stop_token_ids"):
        return sorted(map(repr, value if isinstance(value, (list, tuple, set)) else [value]))
    return value


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
