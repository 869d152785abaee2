"""The processes of a launched server: which there are, and waiting for their end."""

from __future__ import annotations

import time

from torchrl_sglang.server import SGLangRouter, SGLangServer
from torchrl_sglang.server.supervisor import process_table


def tree(server: SGLangServer | SGLangRouter) -> set[int]:
    """Pids of the server's or router's supervisor and of all its descendants."""
    assert server.pid is not None
    table = process_table()
    found = {table[server.pid].parent}
    while below := {pid for pid, row in table.items() if row.parent in found} - found:
        found |= below
    return found


def wait_gone(pids: set[int], timeout_s: float = 30.0) -> set[int]:
    """Wait until all of ``pids`` have ended; those that still exist (zombies too) after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while (left := pids & process_table().keys()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
