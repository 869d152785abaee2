"""Sampling settings of a chat: the call's replace the chat's, which replace the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.config.sampling_values import integer
from torchrl_sglang.errors import ConfigError

__all__ = ["GenerationDefaults"]

_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # those that SGLang takes
_LENGTHS = ("max_new_tokens", "max_tokens", "max_length")
# Used when the server does not report its context length.
_UNKNOWN_CONTEXT_NEW_TOKENS = 1024
# Placeholder above every context length, so that min_new_tokens is only checked against the real limit.
_UNSET_LENGTH = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """The settings that apply to every call.

    Attributes:
        given: the chat's own settings, under any name that :meth:`SamplingParams.from_kwargs` knows, or ``max_length``.
        checkpoint: the checkpoint's ``generation_config.json``: temperature, top_p, top_k, min_p and repetition_penalty
            are taken from it.
        stop_ids: tokens that end a turn.
    """

    given: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    stop_ids: tuple[int, ...]

    def sampling(self, call: Mapping[str, Any], *, prompt_length: int, context_length: int | None) -> SamplingParams:
        """The settings of one call.

        ``max_length`` counts the prompt too; ``max_new_tokens`` takes precedence. Without either, a response may fill
        the context.

        Args:
            call: the call's own settings.
            prompt_length: tokens in the prompt.
            context_length: most tokens of prompt and response together.

        Raises:
            ConfigError: an unknown name, a bad value, or no room for a response.

        Examples:
            >>> defaults = GenerationDefaults(given={"max_length": 30}, checkpoint={"top_p": 0.8}, stop_ids=(2,))
            >>> params = defaults.sampling({"temperature": 0}, prompt_length=10, context_length=64)
            >>> params.max_new_tokens, params.temperature, params.top_p, params.stop_token_ids
            (20, 0, 0.8, (2,))
        """
        recommended = {name: self.checkpoint[name] for name in _RECOMMENDED if self.checkpoint.get(name) is not None}
        params = SamplingParams(max_new_tokens=_UNSET_LENGTH)
        for settings in (recommended, self.given, call):
            params = params.updated(**{name: value for name, value in settings.items() if name not in _LENGTHS})
        params = params.updated(max_new_tokens=self.max_new_tokens(call, prompt_length, context_length))
        if params.ignore_eos:
            return params
        return params.updated(stop_token_ids=tuple(dict.fromkeys((*self.stop_ids, *params.stop_token_ids))))

    def max_new_tokens(self, call: Mapping[str, Any], prompt_length: int, context_length: int | None) -> int:
        """The longest response that a call may get; arguments and errors as :meth:`sampling`."""
        for settings in (call, self.given):
            limits = {name: integer(name, settings[name]) for name in _LENGTHS if settings.get(name) is not None}
            whole = limits.pop("max_length", None)
            if len(set(limits.values())) > 1:
                SamplingParams.from_kwargs(**limits)  # refuses one argument under two names
            if limits:
                return next(iter(limits.values()))
            if whole is not None and whole <= prompt_length:
                raise ConfigError(f"max_length={whole} leaves no room: the prompt alone has {prompt_length} tokens")
            if whole is not None:
                return whole - prompt_length
        if context_length is None:
            return _UNKNOWN_CONTEXT_NEW_TOKENS
        # At least 1: a prompt that fills the context then gets the pool's error about its length.
        return max(1, context_length - prompt_length)
