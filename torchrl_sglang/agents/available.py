"""Names the extra when a package that the gateway needs is not installed; imported before anything that needs one."""

from __future__ import annotations

import importlib.util

from torchrl_sglang.agents import PACKAGES

_MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if _MISSING:
    raise ImportError(
        f"torchrl_sglang.agents needs {', '.join(_MISSING)}: pip install 'torchrl-sglang[agents]'", name=_MISSING[0]
    )
