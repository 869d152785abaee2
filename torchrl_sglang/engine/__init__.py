"""Servers and pool behind the one class people know from TorchRL: :class:`AsyncSGLang`."""

from torchrl_sglang.engine.service import AsyncSGLang

__all__ = ["AsyncSGLang"]
