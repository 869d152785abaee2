"""``AsyncSGLang``: servers, pool and weight sync in one object. May import: server, pool, weights; never rollout."""

from torchrl_sglang.engine.service import AsyncSGLang

__all__ = ["AsyncSGLang"]
