"""The time limits that trainers of a chaos run set, and how long a call may take at most under them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torchrl_sglang import ClientConfig, SyncConfig

__all__ = ["CLIENT", "GENERATE_S", "MAX_GENERATE_S", "MAX_PUSH_S", "sync_config"]

CLIENT = ClientConfig(
    connect_timeout_s=3, probe_timeout_s=5, control_timeout_s=8, update_timeout_s=10, generate_timeout_s=20
)
GENERATE_S = 20.0
"""``timeout_s`` of every call that generates, and the longest time between two events of a stream."""

_MACHINE_S = 5.0  # for a machine whose cores are all busy

MAX_GENERATE_S = GENERATE_S + 2 * CLIENT.update_timeout_s + CLIENT.probe_timeout_s + 3 + _MACHINE_S
"""Beyond its time-out a batch may wait for servers that another process updates (one step of an update), for the
verification of an update that has just ended (another), and for the answer whether a server is dead (3 s and a probe).
"""
_SYNC = SyncConfig(bucket_bytes=60_000, group_timeout_s=10, bucket_timeout_s=6, fixed_timeout_s=20)

MAX_PUSH_S = (
    CLIENT.probe_timeout_s * 3  # is it alive, is its scheduler, which version does it hold
    + _SYNC.bucket_timeout_s  # does another trainer's mark change
    + 2 * _SYNC.group_timeout_s  # the group, for servers that have left the old one too
    + _SYNC.fixed_timeout_s
    + CLIENT.update_timeout_s * 2  # checksums and the probe
    + 3 * 6  # closing a group with a server that does not answer
    + _MACHINE_S
)
"""The sum of a push's time-outs."""


def sync_config(transport: str, folder: Path, *, kind: str) -> SyncConfig:
    """The settings of one trainer's life.

    Args:
        transport: ``shared`` or ``per_server`` process groups, or another transport's name.
        folder: for ``disk``.
        kind: of the servers.

    Verification compares checksums, and with ``real`` servers the log-probs of a prompt too.
    """
    sync = _SYNC if kind == "real" else replace(_SYNC, verify_atol=1e9)  # a fake server's log-probs are no model's
    if transport in ("shared", "per_server"):
        return replace(sync, transport="broadcast", groups=transport)  # type: ignore[arg-type]
    return replace(sync, transport=transport, disk_dir=folder)  # type: ignore[arg-type]
