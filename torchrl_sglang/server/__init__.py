"""SGLang servers and routers as child processes of this one: launch, watch, stop; one or several side by side.

Other folders import the names below from this package, and helpers from :mod:`.cpu`, :mod:`.locate` and
:mod:`.diagnosis`. This folder imports ``errors``, ``config`` and ``model_files``; it talks to servers only to see
whether they are ready.
"""

from torchrl_sglang.server.cpu import needs_cpu_engine
from torchrl_sglang.server.fleet import replicate, start_fleet, stop_fleet
from torchrl_sglang.server.router import SGLangRouter
from torchrl_sglang.server.server import SGLangServer

__all__ = ["SGLangRouter", "SGLangServer", "needs_cpu_engine", "replicate", "start_fleet", "stop_fleet"]
