"""Names the extra when a package that the recipes need is not installed; imported before anything that needs one."""

from __future__ import annotations

import importlib.util

_MISSING = [name for name in ("hydra", "omegaconf", "matplotlib") if importlib.util.find_spec(name) is None]
if _MISSING:
    raise ImportError(
        f"torchrl_sglang.recipes needs {', '.join(_MISSING)}: pip install 'torchrl-sglang[recipes]'", name=_MISSING[0]
    )
