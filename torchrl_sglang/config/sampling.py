"""Settings of sampling, and the names that other libraries use for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torchrl_sglang.config.checking import names_checked, require
from torchrl_sglang.config.foreign_names import GENERATION_ARGUMENTS, unknown_argument
from torchrl_sglang.config.grammars import GRAMMARS, grammar_text
from torchrl_sglang.config.sampling_values import (
    INT32_MAX,
    flag,
    flat_params,
    integer,
    logit_bias,
    number,
    one_or_more,
    text,
    token_ids,
)
from torchrl_sglang.config.stop_patterns import stop_pattern
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
        >>> params = SamplingParams.from_kwargs(max_tokens=16, do_sample=False)
        >>> params.max_new_tokens, params.temperature
        (16, 0.0)
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
    """Keep the k most likely tokens; -1 keeps all, and so does what is taken for -1: 2**30 or more."""
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
    """Constrain the response to a regular expression (needs a grammar backend); a compiled one is taken too."""
    json_schema: str | Mapping[str, Any] | None = None
    """Constrain the response to a JSON schema (needs a grammar backend). A mapping or a pydantic model is written as
    JSON text."""
    ebnf: str | None = None
    """Constrain the response to an EBNF grammar (needs a grammar backend)."""
    structural_tag: str | Mapping[str, Any] | None = None
    """Constrain tagged parts of the response (needs a grammar backend); JSON text, or a mapping."""
    logit_bias: Mapping[int | str, float] | None = None
    """Added to the logits of these token ids; kept with the ids as strings, as JSON requires. At most a million either
    way; minus infinity is taken for minus a million."""
    sampling_seed: int | None = None
    """Seed of this request. SGLang honours it only under ``--enable-deterministic-inference``."""
    custom_params: Mapping[str, Any] | None = None
    """Passed to a custom logit processor: scalars, lists of scalars, one level of dictionaries of scalars."""
    sampling_mask: bool = False
    """Return which tokens top-k, top-p and min-p kept, and the sampled token's log-prob among them. SGLang (0.5.23)
    does so only for ``1 < top_k <= 4096``."""

    def __post_init__(self) -> None:
        for name, value in self._converted().items():
            object.__setattr__(self, name, value)
        require(
            0 <= self.max_new_tokens <= INT32_MAX,
            f"max_new_tokens must be at least 0 and fit into 32 bits, got {self.max_new_tokens}",
        )
        require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must be between 0 and max_new_tokens={self.max_new_tokens}, got {self.min_new_tokens}",
        )
        require(1 <= self.n <= _MOST_SAMPLES, f"n must be between 1 and {_MOST_SAMPLES}, got {self.n}")
        require(
            0 <= self.temperature <= _HOTTEST,
            f"temperature must be at least 0 and at most {_HOTTEST:g}, got {self.temperature}",
        )
        require(_SMALLEST_TOP_P <= self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        require(self.top_k == -1 or self.top_k >= 1, f"top_k must be -1 (all tokens) or at least 1, got {self.top_k}")
        require(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}")
        for name in ("frequency_penalty", "presence_penalty"):
            require(-2 <= getattr(self, name) <= 2, f"{name} must be in [-2, 2], got {getattr(self, name)}")
        require(
            _SMALLEST_REPETITION_PENALTY <= self.repetition_penalty <= 2,
            f"repetition_penalty must be in [{_SMALLEST_REPETITION_PENALTY}, 2], got {self.repetition_penalty}",
        )
        require(
            self.sampling_seed is None or -(2**63) <= self.sampling_seed < 2**63,
            f"sampling_seed must fit into 64 bits, got {self.sampling_seed}",
        )
        require(len(self.stop) <= _MOST_STOPS, f"SGLang takes at most {_MOST_STOPS} stop strings, got {len(self.stop)}")
        require(
            len(self.stop_regex) <= _MOST_STOPS,
            f"SGLang takes at most {_MOST_STOPS} expressions in stop_regex, got {len(self.stop_regex)}",
        )
        grammars = [name for name in GRAMMARS if getattr(self, name) is not None]
        require(len(grammars) <= 1, f"only one grammar can constrain a response, got {' and '.join(grammars)}")

    def _converted(self) -> dict[str, Any]:
        """Every field as the type that SGLang decodes, see :mod:`.sampling_values`."""
        values: dict[str, Any] = {name: integer(name, getattr(self, name)) for name in _INTEGERS}
        values.update({name: number(name, getattr(self, name)) for name in _NUMBERS})
        values.update({name: flag(name, getattr(self, name)) for name in _FLAGS})
        values.update({name: grammar_text(name, getattr(self, name)) for name in GRAMMARS})
        values["stop"] = tuple(text("stop", each) for each in one_or_more("stop", self.stop, "strings"))
        require(all(values["stop"]), f"stop must be non-empty strings, got {self.stop!r}")
        given: Any = self.stop_regex
        patterns = [given] if isinstance(given, re.Pattern) else given
        values["stop_regex"] = tuple(map(stop_pattern, one_or_more("stop_regex", patterns, "strings")))
        values["stop_token_ids"] = token_ids("stop_token_ids", self.stop_token_ids)
        values["logit_bias"] = logit_bias(self.logit_bias)
        values["custom_params"] = flat_params(self.custom_params)
        if self.sampling_seed is not None:
            values["sampling_seed"] = integer("sampling_seed", self.sampling_seed)
        # SGLang takes a temperature this small for greedy decoding, whose log-probs count as temperature 1.
        if 0 < values["temperature"] < _GREEDY_BELOW:
            values["temperature"] = 0.0
        if values["top_k"] >= _ALL_TOKENS:
            values["top_k"] = -1
        return values

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
            >>> params = SamplingParams(max_new_tokens=16, top_p=0.9).updated(max_tokens=4)
            >>> params.max_new_tokens, params.top_p
            (4, 0.9)
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
        if do_sample is not None and not flag("do_sample", do_sample):
            require(
                given.get("temperature", 0) == 0,
                f"do_sample=False is greedy decoding, but temperature={given.get('temperature')} was given: remove one",
            )
            given["temperature"] = 0.0
        if "top_k" in given and integer("top_k", given["top_k"]) == 0:
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
        return not self.is_greedy and (self.top_p < 1 or self.top_k != -1 or self.min_p > 0)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always chosen: ``temperature=0`` or ``top_k=1``."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalises(self) -> bool:
        """Whether penalties or a logit bias change the distribution that tokens are sampled from."""
        return bool(
            self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0 or self.logit_bias
        )

    def for_vocabulary(self, vocab_size: int | None) -> SamplingParams:
        """These settings with ``top_k=-1`` if ``top_k`` keeps all of a vocabulary.

        Args:
            vocab_size: its size; ``None`` if it is not known.

        Examples:
            >>> SamplingParams(top_k=1000).for_vocabulary(512).truncates
            False
        """
        return replace(self, top_k=-1) if vocab_size is not None and self.top_k >= vocab_size > 1 else self

    def to_wire(self) -> dict[str, Any]:
        """SGLang's ``sampling_params``: every field, also those with SGLang's own default.

        A server launched with ``--preferred-sampling-params`` fills in what a request leaves out. For ``top_k=1``,
        SGLang (0.5.23) applies the temperature to log-probs only beside requests that sample: so 0 is sent.
        """
        # sampling_mask is a field of the request, beside sampling_params
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sampling_mask"}
        if self.is_greedy:
            values["temperature"] = 0.0
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


_INTEGERS = ("max_new_tokens", "min_new_tokens", "n", "top_k")
_NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
_FLAGS = ("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "sampling_mask")
_MOST_STOPS = 32
_MOST_SAMPLES = 4096
"""The server makes one request of each; far more of them take its memory."""
_GREEDY_BELOW = 1e-6
_HOTTEST = 1e6
_SMALLEST_TOP_P = 1e-30
_SMALLEST_REPETITION_PENALTY = 0.01
"""Logits are divided by it: SGLang replaces those that overflow, and draws token 0."""
_ALL_TOKENS = 2**30
"""What SGLang takes for all tokens; its scheduler ends on a ``top_k`` beyond 32 bits."""


def _same_form(name: str, value: Any) -> Any:
    """A value that compares equal to another one of the same meaning."""
    if name == "stop":
        return sorted(map(repr, one_or_more(name, value, "strings")))
    return sorted(token_ids(name, value)) if name == "stop_token_ids" else value


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
