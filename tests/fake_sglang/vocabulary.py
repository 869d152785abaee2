"""A checkpoint's vocabulary: size, context length, end tokens and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Vocabulary"]


class _Tokenizer(Protocol):
    def decode(self, ids: list[int]) -> str: ...

    def encode(self, text: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A checkpoint's vocabulary. Without a ``tokenizer.json``, text is ``<id>`` per token."""

    size: int
    context_length: int
    eos_ids: frozenset[int] = frozenset()
    tokenizer: _Tokenizer | None = field(default=None, repr=False)

    @classmethod
    def read(cls, model_path: Path, config: Mapping[str, Any]) -> Vocabulary:
        """Read it from a checkpoint folder."""
        eos = config.get("eos_token_id")
        ids = frozenset(eos) if isinstance(eos, list) else frozenset(() if eos is None else (eos,))
        tokenizer = None
        if (model_path / "tokenizer.json").exists():
            from tokenizers import Tokenizer  # imported only for checkpoints that have a tokenizer

            tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
        return cls(
            size=int(config["vocab_size"]),
            context_length=int(config.get("max_position_embeddings", 2048)),
            eos_ids=ids,
            tokenizer=tokenizer,
        )

    def decode(self, ids: list[int]) -> str:
        """Token ids to text."""
        return self.tokenizer.decode(ids) if self.tokenizer is not None else "".join(f"<{i}>" for i in ids)

    def encode(self, text: str) -> list[int]:
        """Text to token ids."""
        if self.tokenizer is not None:
            return list(self.tokenizer.encode(text).ids)
        return [byte % self.size for byte in text.encode()] or [0]
