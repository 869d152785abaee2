"""Ends a continued answer with a stop string that lies across the place where it was interrupted."""

from __future__ import annotations

from dataclasses import replace

from torchrl_sglang.agents.generated import Generated
from torchrl_sglang.protocol.stop_strings import StopStrings

__all__ = ["cut_at_stop"]


def cut_at_stop(made: Generated, stops: StopStrings) -> Generated:
    """The sequence up to the token that completes a stop string, as a server that had generated all of it would end it.

    Args:
        made: the sequence; one that was not continued stays as it is.
        stops: the stop strings.
    """
    found = stops.find(made.output_ids) if made.resumes else None
    if found is None or (found[0] == len(made.output_ids) and isinstance(made.matched, str)):
        return made
    length, stop = found
    return replace(
        made,
        output_ids=made.output_ids[:length],
        log_probs=made.log_probs[:length],
        versions=made.versions[:length],
        top_log_probs=made.top_log_probs[:length],
        finish_reason="stop",
        matched=stop,
    )
