"""Measures the overhead of `engine.generate` over bare HTTP requests to the same servers.

    python benchmarks/generate_throughput.py                      # tiny model, batches of 1 to 256, 1 and 2 servers
    python benchmarks/generate_throughput.py --servers 1 --pairs 15
    python benchmarks/generate_throughput.py --model /path/to/checkpoint --new-tokens 64

The two run in turn, so that other programs on the machine slow both alike:

    raw      post the same JSON with `requests`, one request per server with its share of the batch; the answers are
             only parsed as JSON
    engine   engine.generate(input_ids=...): check prompts, split them by load, send them, check each field of the
             answers, restore the order

Each line is the median over the rounds of engine / raw, with quartiles. Target: 1.02 or less. The largest batch is also
measured with several servers: there the raw requests are split in advance, so the ratio includes the cost of splitting
and merging.

Ratios are printed, since seconds depend on the machine; its load is printed too. On a busy machine the ratios vary, but
`cpu_percent` does not: the CPU time of this process beyond that of bare requests, in percent of the time of a batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from measuring import Recorder, Timing, add_common_arguments

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
            if share
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


def overhead(base: list[Timing], other: list[Timing], *, tokens: int) -> dict[str, Any]:
    """Details of a row: CPU time beyond the base's, in percent of the base's time; tokens per second."""
    for timing in (*base, *other):
        assert timing.result == tokens, f"{timing.result} tokens instead of {tokens}"
    extra = [100 * (b.cpu_s - a.cpu_s) / a.elapsed_s for a, b in zip(base, other, strict=True)]
    rate = tokens / statistics.median(timing.elapsed_s for timing in other)
    return {"cpu_percent": statistics.median(extra), "tokens_per_s": round(rate)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="checkpoint to serve (default: a tiny llama)")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2], help="numbers of servers to measure")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256], help="prompts per batch")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    add_common_arguments(parser, pairs=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        model = args.model or str(make_tiny_model(Path(folder) / "model", arch="llama", seed=0))
        num_servers = max(args.servers)
        print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; servers: {num_servers} of {model}")
        with AsyncSGLang.from_pretrained(model, dp_size=num_servers, device="cpu", api_key=False) as engine:
            run(engine, args, Recorder("engine", args.rows, args.max_repeats))


def run(engine: AsyncSGLang, args: argparse.Namespace, record: Recorder) -> None:
    sampling = SamplingParams(max_new_tokens=args.new_tokens, temperature=0, ignore_eos=True)
    vocab_size = engine.pool.vocab_size
    assert vocab_size is not None
    urls = [client.url for client in engine.pool.clients]
    cases = [(args.servers[0], batch) for batch in args.batches]
    cases += [(count, max(args.batches)) for count in args.servers[1:]]
    for count, batch in cases:
        # The prompts differ from the first token on, so none share a prefix, whichever server they go to.
        ids_B_T = [
            [(7 * row + 31 * column + row * column) % (vocab_size - 3) + 3 for column in range(args.prompt_tokens)]
            for row in range(batch)
        ]
        tokens = batch * args.new_tokens
        attached = AsyncSGLang.connect(urls[:count])
        record.measure(
            f"{count} server{'s' if count > 1 else ''}, batch of {batch}",
            {"raw": Raw(urls[:count], ids_B_T, sampling), "engine": Engine(attached, ids_B_T, sampling)},
            pairs=args.pairs,
            warm_ups=WARM_UPS,
            before_each=engine.flush_cache,
            settings={"servers": count, "batch": batch, "new_tokens": args.new_tokens},
            details=lambda base, other, tokens=tokens: overhead(base, other, tokens=tokens),
        )


if __name__ == "__main__":
    main()
