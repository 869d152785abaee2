"""A trainer that forks a child between two pushes: `python forked_trainer.py URL TRANSPORT CHECKPOINT`.

A program of its own: a test run has many other threads, beside which neither torch nor gloo survives a fork.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.version import WeightVersion


def in_child(action: Callable[[], Any]) -> None:
    """Run in a forked child; it must end by itself, and without an error."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            action()
        except BaseException as error:  # noqa: BLE001  it must not go on as a second trainer
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with status {status}"


def main(url: str, transport: Any, checkpoint: str) -> None:
    tensors = read_checkpoint(Path(checkpoint))
    client = SGLangClient(url)
    sync = WeightSync(SGLangPool([client]), SyncConfig(transport=transport, verify="full"))
    sync.push(tensors)
    owner = sync.owner

    def push() -> None:
        sync.push({name: tensor + 1 for name, tensor in tensors.items()})
        sync.close()

    in_child(push)
    held = WeightVersion.parse(client.weight_version())
    assert not held.dirty
    assert held.owner != owner
    assert sync.push({name: tensor + 2 for name, tensor in tensors.items()}) is not None  # verified
    in_child(sync.close)  # leaves the parent's groups alone
    assert sync.push({name: tensor + 3 for name, tensor in tensors.items()}) is not None
    sync.close()
    sys.stdout.write("all pushes succeeded\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
