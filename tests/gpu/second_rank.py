"""Rank 1 of a weight group, as SGLang's rank makes it: python second_rank.py ADDRESS PORT GROUP BACKEND NUM_BYTES.

Receives one broadcast and prints the hash of its bytes. Needs torch alone.
"""

from __future__ import annotations

import hashlib
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def main(address: str, port: str, name: str, backend: str, num_bytes: str) -> None:
    timeout = timedelta(seconds=60)
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    store: Any = dist.TCPStore(address, int(port), None, False, timeout)
    kind = "cuda" if backend == "nccl" else "cpu"
    store = dist.PrefixStore(f"{kind}/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
    if backend == "nccl":
        torch.cuda.set_device(device)
        group: Any = dist.ProcessGroupNCCL(store, 1, 2, dist.ProcessGroupNCCL.Options())
    else:
        group = dist.ProcessGroupGloo(store, 1, 2, timeout)
    tensor = torch.zeros(int(num_bytes), dtype=torch.uint8, device=device)
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()
    print(hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
