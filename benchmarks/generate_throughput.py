"""What `engine.generate` costs over bare HTTP requests to the same servers.

    python benchmarks/generate_throughput.py                      # tiny model, batch of 256, 1 and 2 servers
    python benchmarks/generate_throughput.py --servers 1 --pairs 15
    python benchmarks/generate_throughput.py --model /path/to/checkpoint --new-tokens 64

What is compared, in turns, so that other work on the machine hurts both alike:

    raw      the same JSON posted with `requests`, one request per server with its half of the batch; the answers parsed
             as JSON and nothing else
    engine   engine.generate(input_ids=...): prompts checked, split by load, sent, answers checked field by field, put
             back in order

Each line is the median over the pairs of engine / raw. Aimed at: 1.02 or less. With several servers raw requests are
divided beforehand, so the line for them holds what dividing and putting together costs.

Ratios, not seconds, since seconds belong to a machine; the machine's load is printed beside them. On a busy one the
ratios scatter; what stays is `cpu`, the processor time this process spends more than bare requests do, in percent of
the time a batch takes.
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
    """Bare requests: what anybody would write who only wanted the numbers."""

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
    """One run from an empty prefix cache, so that none lives off the one before: elapsed and processor time."""
    flush()
    start, cpu = time.perf_counter(), time.process_time()
    made = run()
    elapsed, used = time.perf_counter() - start, time.process_time() - cpu
    assert made == tokens, f"{made} tokens instead of {tokens}"
    return elapsed, used


def compare(name: str, one: Callable[[], int], two: Callable[[], int], flush: Any, tokens: int, pairs: int) -> float:
    """Print a line; return the median of ``two`` over ``one``."""
    times: list[tuple[float, float]] = []
    extra: list[float] = []
    for index in range(pairs + WARM_UPS):
        order = (one, two) if index % 2 == 0 else (two, one)  # neither is always the first
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint to serve (default: a tiny llama)")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2], help="numbers of servers to measure")
    parser.add_argument("--batch", type=int, default=256, help="prompts per batch")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        model = given.model or str(make_tiny_model(Path(folder) / "model", arch="llama", seed=0))
        most = max(given.servers)
        print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {most} server(s) of {model}")
        with AsyncSGLang.from_pretrained(model, dp_size=most, device="cpu") as engine:
            run(engine, given)


def run(engine: AsyncSGLang, given: argparse.Namespace) -> None:
    sampling = SamplingParams(max_new_tokens=given.new_tokens, temperature=0, ignore_eos=True)
    vocab_size = engine.pool.vocab_size
    assert vocab_size is not None
    # All different from the first token on: no prefix is shared, whichever server they go to.
    ids_B_T = [
        [(7 * row + 31 * column + row * column) % (vocab_size - 3) + 3 for column in range(given.prompt_tokens)]
        for row in range(given.batch)
    ]
    tokens = given.batch * given.new_tokens
    urls = [client.url for client in engine.pool.clients]
    print(f"batch of {given.batch}, {given.prompt_tokens} + {given.new_tokens} tokens, medians of {given.pairs} pairs")
    print(f"{'':34} {'ratio':>6}  {'quartiles':>15}")
    for count in given.servers:
        attached = AsyncSGLang.connect(urls[:count])
        raw, ours = Raw(urls[:count], ids_B_T, sampling), Engine(attached, ids_B_T, sampling)
        name = f"{count} server{'s' if count > 1 else ''}: engine / raw"
        compare(name, raw, ours, engine.flush_cache, tokens, given.pairs)


if __name__ == "__main__":
    main()
