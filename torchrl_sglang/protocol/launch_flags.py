"""Flags that a server was launched with and that change what every request means, read from ``/server_info``.

Requests state every sampling parameter themselves, so most of what ``--preferred-sampling-params`` sets has no effect
on them. What a request can't state is refused, by the flag's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torchrl_sglang.config import SamplingParams
from torchrl_sglang.errors import ConfigError

__all__ = ["preferred_sampling", "refuse_launch_flags"]

_STATED = {field.name for field in fields(SamplingParams)} - {"sampling_mask"}
_HARMLESS = {"stream_interval"}  # how often a stream has an event


def preferred_sampling(server_info: Mapping[str, Any], *, url: str) -> dict[str, Any]:
    """The sampling parameters that the server fills in where a request leaves them out.

    Raises:
        ConfigError: they are in a form that can't be read.

    Examples:
        >>> preferred_sampling({"preferred_sampling_params": '{"top_k": 5}'}, url="http://host")
        {'top_k': 5}
    """
    given = server_info.get("preferred_sampling_params")
    try:
        values = json.loads(given) if isinstance(given, str) and given else given
    except ValueError:
        values = given
    if not values:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{url} was launched with --preferred-sampling-params {given!r}, which can't be read")
    return dict(values)


def refuse_launch_flags(server_info: Mapping[str, Any], *, url: str) -> None:
    """Refuse a server that changes responses in a way that no request can undo.

    Raises:
        ConfigError: names the flag.

    Examples:
        >>> refuse_launch_flags({"preferred_sampling_params": {"beam_width": 4}}, url="http://host")
        Traceback (most recent call last):
        ...
        torchrl_sglang.errors.ConfigError: http://host was launched with --preferred-sampling-params that set \
beam_width for every request, and a request can't undo that: launch it without
    """
    preferred = preferred_sampling(server_info, url=url)
    foreign = sorted(name for name in preferred if name not in _STATED | _HARMLESS)
    reasons = []
    if foreign:
        reasons.append(f"--preferred-sampling-params that set {', '.join(foreign)} for every request")
    if server_info.get("enable_watermark") and _watermarks_by_default(server_info):
        reasons.append("--enable-watermark and a configuration that watermarks every response")
    if server_info.get("speculative_algorithm"):
        for name in ("speculative_accept_threshold_single", "speculative_accept_threshold_acc"):
            if server_info.get(name) not in (None, 1, 1.0):
                reasons.append(f"--{name.replace('_', '-')} {server_info[name]}, which accepts tokens that the model "
                               "would not have drawn")  # fmt: skip
    if reasons:
        raise ConfigError(
            f"{url} was launched with {'; with '.join(reasons)}, and a request can't undo that: launch it without"
        )


def _watermarks_by_default(server_info: Mapping[str, Any]) -> bool:
    return bool(server_info.get("watermark_default_enabled", True) or server_info.get("watermark_enforce_all"))
