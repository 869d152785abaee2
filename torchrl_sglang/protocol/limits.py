"""Checks a batch before it is sent: SGLang crashes on an unknown token id, wherever it is, and on an empty prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.config.grammars import GRAMMARS
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.protocol.messages import ServerInfo

__all__ = ["check_prompts", "check_sampling"]


def check_prompts(
    ids_B_T: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    vocab_size: int | None,
    max_prompt_tokens: int | None,
    context_length: int | None,
) -> None:
    """Refuse a batch that the servers can't serve; the error names the first such prompt and the limit.

    Args:
        ids_B_T: prompt token ids.
        max_new_tokens: most response tokens.
        vocab_size: number of valid ids; ``None`` skips the upper check.
        max_prompt_tokens: longest accepted prompt; ``None`` skips the check.
        context_length: limit of prompt plus response; ``None`` skips the check.

    Raises:
        ConfigError: an empty prompt, an id that is no int, negative or outside the vocabulary, or too many tokens.

    Examples:
        >>> check_prompts([[1, 2], [3, 99]], max_new_tokens=4, vocab_size=64, max_prompt_tokens=8, context_length=16)
        Traceback (most recent call last):
        ...
        torchrl_sglang.errors.ConfigError: prompt 1 holds token id 99 at position 1, but the served vocabulary has 64 \
ids (0..63); is this the served model's tokenizer?
    """
    for index, ids_T in enumerate(ids_B_T):
        if len(ids_T) == 0:
            raise ConfigError(f"prompt {index} is empty; SGLang needs at least one token (start with BOS)")
        if set(map(type, ids_T)) != {int}:
            bad = next(value for value in ids_T if type(value) is not int)
            raise ConfigError(f"prompt {index} holds {bad!r} of type {type(bad).__name__}; token ids are Python ints")
        if min(ids_T) < 0:
            position = next(i for i, value in enumerate(ids_T) if value < 0)
            raise ConfigError(
                f"prompt {index} holds the negative token id {ids_T[position]} at position {position}; "
                "does it still hold padding or an ignore label?"
            )
        if vocab_size is not None and max(ids_T) >= vocab_size:
            position = next(i for i, value in enumerate(ids_T) if value >= vocab_size)
            raise ConfigError(
                f"prompt {index} holds token id {ids_T[position]} at position {position}, but the served vocabulary "
                f"has {vocab_size} ids (0..{vocab_size - 1}); is this the served model's tokenizer?"
            )
        if max_prompt_tokens is not None and len(ids_T) > max_prompt_tokens:
            raise ConfigError(
                f"prompt {index} has {len(ids_T)} tokens, but the server takes at most {max_prompt_tokens}; "
                "shorten it or launch the server with a larger context_length"
            )
        if context_length is not None and len(ids_T) + max_new_tokens > context_length:
            raise ConfigError(
                f"prompt {index} has {len(ids_T)} tokens and max_new_tokens is {max_new_tokens}: together more than "
                f"the context length of {context_length}; lower max_new_tokens or shorten the prompt"
            )


def check_sampling(sampling: SamplingParams, *, vocab_size: int | None, info: ServerInfo) -> None:
    """Refuse settings on which a server would end, or which it would ignore or reject.

    Args:
        sampling: how tokens are drawn.
        vocab_size: number of valid ids; ``None`` skips the checks of ids.
        info: the server.

    Raises:
        ConfigError: names the setting, and the server's flag where one is the reason.
    """
    if vocab_size is not None:
        for token in sampling.stop_token_ids:
            if token >= vocab_size:
                raise ConfigError(
                    f"stop_token_ids holds {token}, but the served vocabulary has {vocab_size} ids "
                    f"(0..{vocab_size - 1}); is this the served model's tokenizer?"
                )
        for token in map(int, sampling.logit_bias or ()):
            if token >= vocab_size:
                raise ConfigError(
                    f"logit_bias names token id {token}, but the served vocabulary has {vocab_size} ids "
                    f"(0..{vocab_size - 1})"
                )
    if sampling.sampling_seed is not None and not info.raw.get("enable_deterministic_inference"):
        raise ConfigError(
            f"seed={sampling.sampling_seed}: {info.url} would ignore it; SGLang honours a seed under "
            "--enable-deterministic-inference only (temperature=0 is repeatable without)"
        )
    grammar = next((name for name in GRAMMARS if getattr(sampling, name) is not None), None)
    if grammar is not None and info.grammar_backend == "none":
        raise ConfigError(
            f"{grammar} needs a grammar backend, but {info.url} was launched with --grammar-backend none "
            '(this package\'s default on a CPU): extra_args=("--grammar-backend", "xgrammar") turns it on'
        )
    if info.skips_tokenizer:
        for name in ("stop", "stop_regex", "min_new_tokens", *GRAMMARS):
            if getattr(sampling, name):
                raise ConfigError(
                    f"{name} needs the server's tokenizer, but {info.url} was launched with --skip-tokenizer-init"
                )
