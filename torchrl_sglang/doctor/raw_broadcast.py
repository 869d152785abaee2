"""Times a bare broadcast between two processes of this machine, for comparison with a weight sync."""

from __future__ import annotations

import socket
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from torchrl_sglang.errors import ServerTimeoutError

__all__ = ["raw_broadcast_s"]

_REPEATS = 5
_TIMEOUT_S = 60.0


def raw_broadcast_s(num_bytes: int, backend: str) -> float:
    """Median seconds to broadcast ``num_bytes`` in one tensor to one other process.

    Args:
        num_bytes: size of the tensor.
        backend: ``"gloo"`` (CPU memory) or ``"nccl"`` (GPUs 0 and 1).

    Raises:
        ServerTimeoutError: the other process did not join the broadcast.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")  # a fork of a process with threads or CUDA may hang
    peer = context.Process(target=_run, args=(1, port, num_bytes, backend), daemon=True)
    peer.start()
    try:
        return _run(0, port, num_bytes, backend)
    except RuntimeError as error:
        raise ServerTimeoutError(f"a bare {backend} broadcast between two processes failed: {error}") from error
    finally:
        peer.join(5.0)
        if peer.is_alive():
            peer.kill()
            peer.join()


def _run(rank: int, port: int, num_bytes: int, backend: str) -> float:
    timeout = timedelta(seconds=_TIMEOUT_S)
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout)  # type: ignore[attr-defined]
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    group: Any
    if backend == "nccl":
        torch.cuda.set_device(device)
        group = dist.ProcessGroupNCCL(store, rank, 2, dist.ProcessGroupNCCL.Options())
    else:
        group = dist.ProcessGroupGloo(store, rank, 2, timeout)
    tensor = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    options = dist.BroadcastOptions()
    options.rootRank = 0
    seconds = []
    for _ in range(_REPEATS):
        start = time.monotonic()
        group.broadcast([tensor], options).wait()
        if backend == "nccl":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds)
