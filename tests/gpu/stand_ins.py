"""Stand for servers: processes of ours that open weights, in the place of clients; and imports without TorchRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUCKET_BYTES = 4 * 2**20


def prepare_imports() -> None:
    """Make the package's weight folders importable without TorchRL, which the package's own front doors load."""
    sys.path[:0] = [str(ROOT), *(str(path) for path in (ROOT / "kit_packages",) if path.exists())]
    for name in ("weights", "pool"):
        module = types.ModuleType(f"torchrl_sglang.{name}")
        module.__path__ = [str(ROOT / "torchrl_sglang" / name)]
        sys.modules[module.__name__] = module
    # The pool's front door is needed for its records alone.
    from torchrl_sglang.pool.state import PoolState

    pool: Any = sys.modules["torchrl_sglang.pool"]
    pool.PoolState, pool.SGLangPool = PoolState, object


class Receiver:
    """A process that opens weights, as a client of one server; a ``with`` block.

    It stands for a server in :class:`IpcTransport` and :class:`TensorLoop`: they see its URL, what it is, and ``send``.
    """

    def __init__(self, device: str, number: int = 0, environ: Mapping[str, str] | None = None) -> None:
        self.url = f"http://receiver-{number}"
        self.info = types.SimpleNamespace(tp_size=1, dp_size=1, pp_size=1, device=device, raw={})
        self.seen: dict[str, Any] = {}
        self.hold = False
        self._lock = threading.Lock()  # the next bucket is announced while one is loaded
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "receiver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environ or {})},
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self._lock:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the receiver ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def send(self, request: Any, *, timeout_s: float) -> dict[str, Any]:
        """What a server does with a bucket. The time-out is the whole check's."""
        from torchrl_sglang.errors import RequestRejectedError

        [payload] = request.body["serialized_named_tensors"]
        try:
            self.seen |= self.ask(do="load", payload=payload.decode(), hold=self.hold)["tensors"]
        except (RuntimeError, OSError) as error:
            raise RequestRejectedError(str(error), server=self.url, status=500, detail=str(error)) from error
        return {"success": True}

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()


class Checks:
    """Stands for the detection of the servers' processes, which needs real ones."""

    def __init__(self, receivers: list[Receiver]) -> None:
        from torchrl_sglang.weights.shared_memory import same_host

        self._found = {
            each.url: same_host.HostCheck(schedulers=(types.SimpleNamespace(pid=each.process.pid),))  # type: ignore[arg-type]
            for each in receivers
        }

    def check(self, clients: Any) -> dict[str, Any]:
        return {client.url: self._found[client.url] for client in clients}


class Sync:
    """Pushes tensors by :class:`IpcTransport` to receivers, without a session; a ``with`` block."""

    def __init__(self, receivers: list[Receiver], *, staged: bool = False) -> None:
        from torchrl_sglang.config import SyncConfig
        from torchrl_sglang.pool.state import PoolState
        from torchrl_sglang.weights.transports.ipc import IpcTransport

        self.receivers = receivers
        self.config = SyncConfig(transport="ipc", bucket_bytes=BUCKET_BYTES)
        self.pool: Any = types.SimpleNamespace(state=PoolState([each.url for each in receivers]))
        self.transport = IpcTransport(self.pool, self.config, Checks(receivers))  # type: ignore[arg-type]
        self.staged = staged

    def push(self, tensors: Mapping[str, Any]) -> int:
        """Send; returns the number of buckets. Servers that failed are in the error or in ``failed``."""
        from torchrl_sglang.protocol.version import WeightVersion
        from torchrl_sglang.weights.buckets.layout import plan_buckets
        from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
        from torchrl_sglang.weights.transports.base import PackedWeights
        from torchrl_sglang.weights.transports.tensor_loop import TensorLoop
        from torchrl_sglang.weights.update.report import SyncReport

        self.transport.connect(self.receivers)  # type: ignore[arg-type]
        plan = plan_buckets([TensorSpec.of(name, each) for name, each in tensors.items()], bucket_bytes=BUCKET_BYTES)
        packer, report = self.transport.packer, SyncReport(version=1, transport="ipc")
        packer.is_staged = self.staged
        buckets = packer.packed(plan, lambda names: ((name, tensors[name]) for name in names))
        packed = PackedWeights(buckets, report, num_buckets=len(plan), is_staged=self.staged)
        self.transport.stage(packed, WeightVersion(number=1), report)
        deadline = time.monotonic() + 60
        receivers: Any = self.receivers
        loop = TensorLoop(receivers, self.pool.state, self.transport, self.config, deadline)
        self.failed = loop.run(packed, num_buckets=len(plan), flush_cache=False)
        return len(plan)

    def __enter__(self) -> Sync:
        return self

    def __exit__(self, *exc: object) -> None:
        self.transport.close()


def make_tensors(device: str, seed: int = 0) -> dict[str, Any]:
    """A small model's worth: several buckets, every dtype, an empty tensor, a number, one larger than a bucket."""
    import torch

    torch.manual_seed(seed)
    tensors = {
        f"model.layers.{i}.mlp.{name}.weight": torch.randn(512, 700, device=device)
        for i in range(6)
        for name in ("up_proj", "down_proj")
    }
    tensors["model.embed_tokens.weight"] = torch.randn(3000, 700, device=device)
    tensors["model.norm.weight"] = torch.randn(700, device=device, dtype=torch.bfloat16)
    tensors["model.norm.bias"] = torch.randn(3, device=device, dtype=torch.float16)
    tensors["model.empty"] = torch.empty(0, 5, device=device)
    tensors["model.step"] = torch.tensor(seed, device=device)
    tensors["model.transposed"] = torch.randn(300, 200, device=device).t()
    return tensors


def described(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What a receiver must have seen."""
    sys.path.insert(0, str(HERE))
    from receiver import describe  # type: ignore[import-not-found]

    return {name: describe(tensor) for name, tensor in tensors.items()}


class SecondRank:
    """Stands for a server in a weight group: told to join, it starts a process with rank 1."""

    def __init__(self, device: str, num_bytes: int, environ: Mapping[str, str]) -> None:
        self.url = "http://127.0.0.1:1"
        self.info = types.SimpleNamespace(tp_size=1, dp_size=1, pp_size=1, device=device, raw={})
        self.process: subprocess.Popen[str] | None = None
        self._num_bytes, self._environ = num_bytes, environ

    def send(self, request: Any, *, timeout_s: float | None = None) -> dict[str, Any]:
        if request.path == "/init_weights_update_group":
            body = request.body
            words = [body["master_address"], body["master_port"], body["group_name"], body["backend"], self._num_bytes]
            command = [sys.executable, str(HERE / "second_rank.py"), *map(str, words)]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(self._environ))
        return {"success": True}
