"""Opens weights as a rank of an SGLang server does, without SGLang: a JSON line in, a JSON line out.

    {"do": "load", "payload": TEXT, "hold": false}   -> {"tensors": {name: [dtype, shape, sha256 of its bytes]}}
    {"do": "free"}                                   -> {"freed": number of tensors}
    {"do": "die"}                                    -> nothing: the process ends at once, with its mappings open

The unpickler allows what SGLang 0.5.23 allows of torch, and GPUs are named by their UUID, as its patch of torch reads
them. Independent of the package on purpose: what it finds is compared with the trainer's tensors.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import io
import json
import os
import pickle
import sys
from typing import Any

import torch
from torch.multiprocessing import reductions

ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch", "bfloat16"),
    ("torch", "float16"),
    ("torch", "float32"),
    ("torch", "int64"),
    ("torch", "uint8"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
    ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
    ("torch.storage", "TypedStorage"),
    ("torch.storage", "UntypedStorage"),
}
DEVICE = 6  # position of the GPU among the arguments of torch's rebuild_cuda_tensor


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return rebuild_by_uuid if name == "rebuild_cuda_tensor" else super().find_class(module, name)


def rebuild_by_uuid(*arguments: Any) -> torch.Tensor:
    uuid = arguments[DEVICE]
    numbers = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    return reductions.rebuild_cuda_tensor(*arguments[:DEVICE], numbers[uuid], *arguments[DEVICE + 1 :])


def describe(tensor: torch.Tensor) -> list[Any]:
    """Dtype, shape and the hash of a tensor's bytes."""
    content = (
        tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()]


def main() -> None:
    held: list[Any] = []
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "die":
            os._exit(9)
        if command["do"] == "free":
            answer: dict[str, Any] = {"freed": sum(map(len, held))}
            held.clear()
            gc.collect()
        else:
            pairs = Unpickler(io.BytesIO(base64.b64decode(command["payload"]))).load()
            answer = {"tensors": {name: describe(tensor) for name, tensor in pairs}}
            if command.get("hold"):
                held.append(pairs)
            del pairs
        if torch.cuda.is_initialized():
            torch.cuda.ipc_collect()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
