"""The tokenizer that belongs to the served model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.pool import SGLangPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]


def load_tokenizer(pool: SGLangPool) -> PreTrainedTokenizerBase:
    """The tokenizer that the servers of ``pool`` were told to use.

    Raises:
        ConfigError: its path can't be read from this machine.
    """
    from transformers import AutoTokenizer  # slow to import, and not needed for token-only use

    path = pool.info.tokenizer_path
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the served tokenizer {path!r} can't be loaded here ({error}); pass tokenizer=") from error
