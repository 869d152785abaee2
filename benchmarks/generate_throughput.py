"""Measures the overhead of `engine.generate` over bare HTTP requests to the same servers.

    python benchmarks/generate_throughput.py                      # tiny model, batch of 256, 1 and 2 servers
    python benchmarks/generate_throughput.py --servers 1 --pairs 15
    python benchmarks/generate_throughput.py --model /path/to/checkpoint --new-tokens 64

The two run alternately, so that other programs on the machine slow both alike:

    raw      post the same JSON with `requests`, one request per server with its share of the batch; the answers are
             only parsed as JSON
    engine   engine.generate(input_ids=...): check prompts, split them by load, send them, check each field of the
             answers, restore the order

Each line is the median over the pairs of engine / raw. Target: 1.02 or less. With several servers the raw requests are
split in advance, so the ratio includes the cost of splitting and merging.

Ratios are printed, since seconds depend on the machine; its load is printed too. On a busy machine the ratios vary, but
`cpu` does not: the CPU time of this process beyond that of bare requests, in percent of the time of a batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from torchrl_sglang import AsyncSGLang, SamplingParams
from torchrl_sglang.protocol.generate import build_generate
from torchrl_sglang.protocol.routing import split_batch
from torchrl_sglang.testing import make_tiny_model

WARM_UPS = 2


class Raw:
    """Bare requests with `requests`, without any check."""

    def __init__(self, urls: list[str], ids_B_T: list[list[int]], sampling: SamplingParams) -> None:
        shares = split_batch(ids_B_T, [0] * len(urls))
        self._threads = ThreadPoolExecutor(len(urls))
        self._calls = [
            (requests.Session(), url, build_generate([ids_B_T[i] for i in share], sampling).body)
            for url, share in zip(urls, shares, strict=True)
        ]

    def __call__(self) -> int:
        answers = self._threads.map(self._post, self._calls)
        return sum(len(reply["output_ids"]) for answer in answers for reply in answer)

    @staticmethod
    def _post(call: tuple[requests.Session, str, Any]) -> list[dict[str, Any]]:
        session, url, body = call
        answer = session.post(f"{url}/generate", json=body, timeout=600)
        answer.raise_for_status()
        return list(answer.json())


class Engine:
    """The same through :class:`AsyncSGLang`."""

    def __init__(self, engine: AsyncSGLang, ids_B_T: list[list[int]], sampling: SamplingParams) -> None:
        self._engine, self._ids_B_T, self._sampling = engine, ids_B_T, sampling

    def __call__(self) -> int:
        replies = self._engine.generate(input_ids=self._ids_B_T, sampling_params=self._sampling)
        assert isinstance(replies, list)
        return sum(len(reply.output_ids) for reply in replies)


def seconds(run: Callable[[], int], flush: Callable[[], None], tokens: int) -> tuple[float, float]:
    """Elapsed and CPU time of one run; the prefix cache is flushed first, so that runs don't profit from each other."""
    flush()
    start, cpu = time.perf_counter(), time.process_time()
    generated = run()
    elapsed, used = time.perf_counter() - start, time.process_time() - cpu
    assert generated == tokens, f"{generated} tokens instead of {tokens}"
    return elapsed, used


def compare(name: str, one: Callable[[], int], two: Callable[[], int], flush: Any, tokens: int, pairs: int) -> float:
    """Print a line; return the median of ``two`` over ``one``."""
    times: list[tuple[float, float]] = []
    extra: list[float] = []
    for index in range(pairs + WARM_UPS):
        order = (one, two) if index % 2 == 0 else (two, one)  # each is first in half of the pairs
        measured = {id(run): seconds(run, flush, tokens) for run in order}
        if index >= WARM_UPS:
            (first, first_cpu), (second, second_cpu) = measured[id(one)], measured[id(two)]
            times.append((first, second))
            extra.append(100 * (second_cpu - first_cpu) / first)
    ratios = [b / a for a, b in times]
    quartiles = statistics.quantiles(ratios, n=4)
    median = statistics.median(ratios)
    rate = tokens / statistics.median(b for _, b in times)
    print(
        f"{name:34} {median:6.3f}  {quartiles[0]:6.3f} ..{quartiles[2]:6.3f}  {rate:9.0f} tokens/s  "
        f"cpu {statistics.median(extra):+5.2f} %  load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return median


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="checkpoint to serve (default: a tiny llama)")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2], help="numbers of servers to measure")
    parser.add_argument("--batch", type=int, default=256, help="prompts per batch")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        model = args.model or str(make_tiny_model(Path(folder) / "model", arch="llama", seed=0))
        num_servers = max(args.servers)
        print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; servers: {num_servers} of {model}")
        with AsyncSGLang.from_pretrained(model, dp_size=num_servers, device="cpu", api_key=False) as engine:
            run(engine, args)


def run(engine: AsyncSGLang, args: argparse.Namespace) -> None:
    sampling = SamplingParams(max_new_tokens=args.new_tokens, temperature=0, ignore_eos=True)
    vocab_size = engine.pool.vocab_size
    assert vocab_size is not None
    # The prompts differ from the first token on, so none share a prefix, whichever server they go to.
    ids_B_T = [
        [(7 * row + 31 * column + row * column) % (vocab_size - 3) + 3 for column in range(args.prompt_tokens)]
        for row in range(args.batch)
    ]
    tokens = args.batch * args.new_tokens
    urls = [client.url for client in engine.pool.clients]
    print(f"batch of {args.batch}, {args.prompt_tokens} + {args.new_tokens} tokens, medians of {args.pairs} pairs")
    print(f"{'':34} {'ratio':>6}  {'quartiles':>15}")
    for count in args.servers:
        attached = AsyncSGLang.connect(urls[:count])
        raw, ours = Raw(urls[:count], ids_B_T, sampling), Engine(attached, ids_B_T, sampling)
        name = f"{count} server{'s' if count > 1 else ''}: engine / raw"
        compare(name, raw, ours, engine.flush_cache, tokens, args.pairs)


if __name__ == "__main__":
    main()
