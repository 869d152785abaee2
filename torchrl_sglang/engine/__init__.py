"""``AsyncSGLang``: servers, pool and weight sync in one object.

Other folders import the name below from this package, and launch settings from :mod:`.launching`. This folder imports
everything below it: client, protocol, config, server, pool and weights, never rollout.
"""

from torchrl_sglang.engine.service import AsyncSGLang

__all__ = ["AsyncSGLang"]
