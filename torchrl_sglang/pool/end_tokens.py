"""The tokens that SGLang suppresses for ``min_new_tokens``: those of the request, the model and the server's tokenizer.

SGLang (0.5.23) ends its scheduler if one of them is outside the vocabulary, also one that no request named.
"""

from __future__ import annotations

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import load_tokenizer, read_model_json
from torchrl_sglang.protocol.messages import ServerInfo

__all__ = ["EndTokens"]

# SGLang (0.5.23) adds these where the tokenizer has them.
_ALSO_END = ("<|eom_id|>", "<|content_model_end_sampling|>", "<|ifm|im_end|>")


class EndTokens:
    """The end tokens of a served model, read once per model."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str | None], dict[str, int]] = {}

    def check(self, info: ServerInfo, vocab_size: int) -> None:
        """Refuse ``min_new_tokens`` on a model whose end tokens the server can't suppress.

        Args:
            info: the server.
            vocab_size: number of valid ids.

        Raises:
            ConfigError: names the token and where it is from.
        """
        key = (info.model_path, info.tokenizer_path, info.revision)
        if key not in self._known:
            self._known[key] = _read(*key)
        for source, token in self._known[key].items():
            if token >= vocab_size:
                raise ConfigError(
                    f"min_new_tokens suppresses the end tokens, but {source} is {token}, and the served vocabulary has "
                    f"{vocab_size} ids: SGLang can't suppress it and would end. Leave min_new_tokens out, or serve the "
                    "model with a tokenizer that fits"
                )


def _read(model: str, tokenizer: str, revision: str | None) -> dict[str, int]:
    """End tokens with where they are from; nothing where the files can't be read from this machine."""
    found: dict[str, int] = {}
    for name in ("config.json", "generation_config.json"):
        eos = read_model_json(model, name, revision).get("eos_token_id")
        for token in eos if isinstance(eos, list) else [eos]:
            if isinstance(token, int):
                found[f"eos_token_id in {name} ({token})"] = token
    try:
        loaded = load_tokenizer(tokenizer, revision)
    except ConfigError:
        return found
    if isinstance(loaded.eos_token_id, int):
        found["the tokenizer's eos_token"] = loaded.eos_token_id
    added = loaded.get_added_vocab()
    found.update({f"the tokenizer's {text}": added[text] for text in _ALSO_END if text in added})
    return found
