"""Servers and pool behind the one class people know from TorchRL: :class:`AsyncSGLang`."""

from torchrl_sglang.engine.service import AsyncSGLang
from torchrl_sglang.engine.tokenizer import load_tokenizer

__all__ = ["AsyncSGLang", "load_tokenizer"]
