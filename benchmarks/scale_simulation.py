"""Measures what this package costs the trainer's process with many servers, buckets and rollouts. No GPU, no SGLang.

    python benchmarks/scale_simulation.py                 # 64 servers, 2,000 buckets, 1,000 rollouts: some minutes
    python benchmarks/scale_simulation.py --servers 8 --buckets 100 --rollouts 50

The servers are small programs that answer SGLang's API and receive the broadcasts over gloo, a few processes with many
servers each. Tensors are tiny: what is measured is not the network, but the client's own work, as CPU time of this
process (user and system, all threads), which programs beside it don't change. Four lines are printed:

    connect    ask every server what it serves, and make the process groups
    update     one weight update: per server and bucket (announce, broadcast, read the reply), and the rest per server
    rollouts   that many `pool.generate` calls at once, each in a thread of its own
    close      destroy the groups

`--groups shared` makes one group, as with NCCL: one broadcast per bucket, and an announcement per server and bucket.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from torchrl_sglang import ClientConfig, SamplingParams, SGLangClient, SGLangPool, SyncConfig, WeightSync
from torchrl_sglang.weights.checkpoint.headers import Checkpoint

SERVERS_PER_PROCESS = 16
TENSOR_SIZE = 256  # floats: a bucket of one tensor
NEW_TOKENS = 64
GENERATE_S = 10.0  # how long a server takes for a request: longer than it takes to send all of them
VOCAB_SIZE = 32_000

# ------------------------------------------------------------------------------------------------------- the servers


class Server:
    """Answers what an update and a rollout send. Knows nothing of weights: it receives bytes and drops them."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._version = "default"
        self._groups: dict[str, Any] = {}

    async def answer(self, path: str, body: dict[str, Any]) -> Any:
        loop = asyncio.get_running_loop()
        if path == "/generate":
            await asyncio.sleep(GENERATE_S)
            return [self._reply(ids) for ids in body["input_ids"]]
        if path == "/model_info":
            names = {"model_path": "simulated", "tokenizer_path": "simulated", "architectures": ["Simulated"]}
            return {**names, "is_generation": True, "weight_version": self._version}
        if path == "/server_info":
            sizes = {"tp_size": 1, "dp_size": 1, "pp_size": 1, "max_total_num_tokens": 10**6, "context_length": 8192}
            return {"model_path": "simulated", "device": "cpu", "dtype": "float32", "version": "0.5.23", **sizes}
        if path == "/v1/loads":
            return {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]}
        if path == "/init_weights_update_group":
            await loop.run_in_executor(self._threads, self._join, body)
        elif path == "/update_weights_from_distributed":
            await loop.run_in_executor(self._threads, self._receive, body)
        elif path == "/destroy_weights_update_group":
            self._groups.pop(body["group_name"], None)
        elif path == "/update_weight_version":
            self._version = body["new_version"]
        return {"success": True, "message": ""}

    def _join(self, body: dict[str, Any]) -> None:
        name, limit = body["group_name"], timedelta(seconds=600)
        store = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], False, limit)
        prefixed = dist.PrefixStore("cpu/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
        self._groups[name] = dist.ProcessGroupGloo(prefixed, body["rank_offset"], body["world_size"], limit)

    def _receive(self, body: dict[str, Any]) -> None:
        num_bytes = 4 * sum(torch.Size(shape).numel() for shape in body["shapes"])
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._groups[body["group_name"]].broadcast([torch.empty(num_bytes, dtype=torch.uint8)], options).wait()

    def _reply(self, ids: list[int]) -> dict[str, Any]:
        meta = {
            "id": "0",
            "finish_reason": {"type": "length", "length": NEW_TOKENS},
            "prompt_tokens": len(ids),
            "completion_tokens": NEW_TOKENS,
            "weight_version": self._version,
            "weight_versions": [{"version": self._version, "start": 0, "end": NEW_TOKENS}],
            "output_token_logprobs": [[-1.0, 7, None]] * NEW_TOKENS,
        }
        return {"text": "", "output_ids": [7] * NEW_TOKENS, "meta_info": meta}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                size = next((int(line[15:]) for line in head if line.lower().startswith("content-length:")), 0)
                body = json.loads(await reader.readexactly(size)) if size else {}
                is_probe = (method, path) == ("GET", "/begin_weight_update")  # it asks whether the path exists
                status = "405 Method Not Allowed" if is_probe else "200 OK"
                text = json.dumps(None if is_probe else await self.answer(path, body)).encode()
                kind = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
                writer.write(kind.encode() + text)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


def serve_many(count: int, parent: Connection) -> None:
    """Serve on ``count`` ports, until the parent ends."""

    async def serve() -> None:
        threads = ThreadPoolExecutor(2 * count)
        options: dict[str, Any] = {"backlog": 2048, "reuse_address": False}  # else two may get the same port
        listening = [await asyncio.start_server(Server(threads).serve, "127.0.0.1", 0, **options) for _ in range(count)]
        parent.send([f"http://127.0.0.1:{each.sockets[0].getsockname()[1]}" for each in listening])
        await asyncio.get_running_loop().run_in_executor(None, parent.poll, None)

    asyncio.run(serve())


# --------------------------------------------------------------------------------------------------------- the client


class Cost:
    """Wall time and CPU time of this process, of a ``with`` block."""

    def __enter__(self) -> Cost:
        self._wall, self._cpu = time.monotonic(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall_s, self.cpu_s = time.monotonic() - self._wall, time.process_time() - self._cpu

    def __str__(self) -> str:
        return f"{self.wall_s:7.2f} s, {self.cpu_s:7.2f} s of CPU"


def rollouts(pool: SGLangPool, count: int) -> tuple[Cost, int]:
    """That many calls at once; their cost, and the most that were under way."""
    under_way = most = 0
    lock = threading.Lock()
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS)

    def one(index: int) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        (reply,) = pool.generate([[1 + index % (VOCAB_SIZE - 1)] * 128], sampling)
        assert len(reply.output_ids) == NEW_TOKENS
        with lock:
            under_way -= 1

    with Cost() as cost, ThreadPoolExecutor(count) as threads:
        list(threads.map(one, range(count)))
    return cost, most


def simulate(urls: list[str], *, num_buckets: int, num_rollouts: int, groups: Any, show: Callable[[str], None]) -> None:
    tensors = {f"block{index}.weight": torch.ones(TENSOR_SIZE) for index in range(num_buckets)}
    checkpoint = Checkpoint.from_specs(dict.fromkeys(tensors, ((TENSOR_SIZE,), torch.float32)))
    client = ClientConfig(vocab_size=VOCAB_SIZE)
    pool = SGLangPool([SGLangClient(url, client) for url in urls])
    config = SyncConfig(transport="broadcast", groups=groups, bucket_bytes=4 * TENSOR_SIZE, verify="off")
    sync = WeightSync(pool, config, checkpoint=checkpoint)
    count = len(urls)
    with Cost() as cost:
        sync.connect()
    show(f"connect    {cost}: {1e3 * cost.cpu_s / count:.1f} ms per server")

    with Cost() as cost:
        report = sync.push(tensors)
    assert report is not None
    assert report.num_buckets == num_buckets
    transfer = report.seconds["transfer"] / report.total_s
    per_bucket = cost.cpu_s * transfer / num_buckets
    show(
        f"update     {cost}: {1e3 * per_bucket:.2f} ms per bucket, {1e3 * per_bucket / count:.3f} ms per bucket and "
        f"server; {1e3 * report.seconds['transfer'] / num_buckets:.1f} ms of wall time per bucket; "
        f"{1e3 * cost.cpu_s * (1 - transfer) / count:.1f} ms per server for the rest"
    )
    cost, most = rollouts(pool, num_rollouts)
    show(f"rollouts   {cost}: {1e3 * cost.cpu_s / num_rollouts:.2f} ms per rollout, {most} at once")
    with Cost() as cost:
        sync.close()
    show(f"close      {cost}: {1e3 * cost.cpu_s / count:.1f} ms per server")
    pool.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    show(f"memory     {peak:.0f} MB at most in this process")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--servers", type=int, default=64)
    parser.add_argument("--buckets", type=int, default=2000)
    parser.add_argument("--rollouts", type=int, default=1000, help="calls at once")
    parser.add_argument("--groups", choices=("per_server", "shared"), default="per_server")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    processes, urls, pipes = [], [], []
    for first in range(0, args.servers, SERVERS_PER_PROCESS):
        ours, theirs = context.Pipe()
        number = min(SERVERS_PER_PROCESS, args.servers - first)
        processes.append(context.Process(target=serve_many, args=(number, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)  # a server ends when its pipe is closed
        urls += ours.recv()
    print(f"{len(urls)} servers, {args.buckets} buckets, {args.rollouts} rollouts, groups={args.groups!r}", flush=True)
    try:
        simulate(
            urls,
            num_buckets=args.buckets,
            num_rollouts=args.rollouts,
            groups=args.groups,
            show=lambda line: print(line, flush=True),
        )
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
