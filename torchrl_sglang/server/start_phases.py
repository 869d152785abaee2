"""How far the start of a server is, in words, read from its log."""

from __future__ import annotations

import re

__all__ = ["start_phase"]

# In the order of a start. A phase begins when its pattern is in the log; the last one found is the current one.
# Durations: SmolLM2-135M-Instruct on 2 idle CPU cores, SGLang 0.5.23. They grow with the model, and beside other work.
_PHASES: tuple[tuple[str, str], ...] = (
    (r"", "importing SGLang (usually 5 to 10 s)"),
    (r"server_args=|chat template with detected", "starting its workers (usually 5 to 10 s)"),
    (r"Load weight begin", "loading the weights (usually 1 s per GB from a local disk)"),
    (r"Load weight end", "allocating the KV cache (usually 1 to 3 s)"),
    (r"[Cc]apture.*(cuda|CUDA) graph.*begin", "capturing CUDA graphs (usually 10 s to a minute)"),
    (r"Uvicorn running on", "opening its port (usually 1 s)"),
)
_PERCENT = re.compile(r"(\d+)% Completed")


def start_phase(log: str) -> str:
    r"""The phase of a server that is starting, with its usual duration.

    Args:
        log: its log so far, or the end of it.

    Examples:
        >>> start_phase("")
        'importing SGLang (usually 5 to 10 s)'
        >>> start_phase("[2026-01-01 10:00:00] Load weight begin. avail mem=10.61 GB\nshards:  50% Completed | 1/2")
        'loading the weights (usually 1 s per GB from a local disk), 50 %'
    """
    pattern, text = next(each for each in reversed(_PHASES) if re.search(each[0], log))
    percent = _PERCENT.findall(log) if "weights" in text and "Load" in pattern else []
    return f"{text}, {percent[-1]} %" if percent else text
