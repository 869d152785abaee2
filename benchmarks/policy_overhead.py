"""Measures the overhead of `SGLangWrapper` over one bare HTTP request with the same batch.

    python benchmarks/policy_overhead.py                                  # SmolLM2-135M on 2 cores: about 8 minutes
    python benchmarks/policy_overhead.py --batches 16:32 --pairs 15       # 16 sequences of 32 new tokens
    python benchmarks/policy_overhead.py --tiny --batches 16:16 --pairs 3 # a minute; the server's share is unrealistic

They run in turn, so that other programs on the machine slow all alike:

    raw      post the same ids and settings with `requests`; the answer is only parsed as JSON
    tokens   the policy on token ids: TensorDict in, TensorDict with tokens, masks, log-probs and Generation out
    chats    the policy on chats: the same, plus chat template, tokenizer, decoding and the extended conversation

Each line is the median over the rounds of policy / raw, with quartiles. Target: 1.03 or less. If runs vary,
`cpu_percent` is more reliable: the CPU time of this process beyond that of bare requests, in percent of the time of a
call. The last line compares 16 threads that call the policy with one prompt each, with ``batching=True``, with one call
of 16 prompts. Target: 1.

The wrapper's own work grows with the number of sequences, not with their length: real responses are longer than those
here and take more time on the server, but not in the wrapper.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from generate_throughput import Raw, overhead
from measuring import Recorder, add_common_arguments
from tensordict import TensorDict, TensorDictBase, lazy_stack, set_list_to_stack
from torchrl.data.llm import History
from torchrl.modules.llm import ChatHistory

from torchrl_sglang import AsyncSGLang, SamplingParams, SGLangWrapper, smollm2_checkpoint
from torchrl_sglang.testing import make_tiny_model

THREADS = 16
BATCHES = ["1:16", "16:16", "64:8", "256:4"]  # large batches of short answers keep the time of a call alike


class Policy:
    """One call of the policy; returns the number of new tokens."""

    def __init__(self, policy: SGLangWrapper, data_B: TensorDictBase) -> None:
        self._policy, self._data_B = policy, data_B

    def __call__(self) -> int:
        out_B = self._policy(self._data_B.copy())
        return sum(map(len, out_B.get(("tokens", "response"), as_list=True)))


class Threads:
    """Threads that call the policy with one prompt each, as environments in threads do."""

    def __init__(self, policy: SGLangWrapper, data_B: TensorDictBase) -> None:
        self._calls = [Policy(policy, data_B[i : i + 1]) for i in range(len(data_B))]
        self._threads = ThreadPoolExecutor(len(self._calls))

    def __call__(self) -> int:
        return sum(self._threads.map(lambda call: call(), self._calls))


def chats(count: int) -> TensorDict:
    """``count`` different questions."""
    questions = [[{"role": "user", "content": f"{i} + {7 * i} is what? Only the number."}] for i in range(count)]
    return TensorDict(history=ChatHistory(prompt=History.from_chats(questions)), batch_size=[count])


def ids_of(policy: SGLangWrapper, history_B: TensorDictBase) -> list[list[int]]:
    """Token ids that the policy sends for these chats."""
    prompts = policy(history_B.copy()).get(("tokens", "prompt"), as_list=True)
    return [prompt.tolist() for prompt in prompts]


def measure_batch(engine: AsyncSGLang, count: int, new_tokens: int, record: Recorder, pairs: int) -> None:
    settings = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
    by_history = SGLangWrapper(engine, input_mode="history", generate_kwargs=settings)
    by_tokens = SGLangWrapper(engine, input_mode="tokens", generate_kwargs=settings)
    history_B = chats(count)
    ids_B_T = ids_of(by_history, history_B)
    tokens_B = lazy_stack([TensorDict(tokens=TensorDict(prompt=torch.tensor(ids_T))) for ids_T in ids_B_T])
    record.measure(
        f"batch of {count}",
        {
            "raw": Raw([engine.pool.clients[0].url], ids_B_T, SamplingParams(**settings)),
            "tokens": Policy(by_tokens, tokens_B),
            "chats": Policy(by_history, history_B),
        },
        pairs=pairs,
        before_each=engine.flush_cache,
        settings={"batch": count, "new_tokens": new_tokens},
        details=lambda base, other: overhead(base, other, tokens=count * new_tokens),
    )


def measure_threads(engine: AsyncSGLang, new_tokens: int, record: Recorder, pairs: int) -> None:
    settings = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
    history_B = chats(THREADS)
    one = SGLangWrapper(engine, input_mode="history", generate_kwargs=settings)
    batching = SGLangWrapper(
        engine, input_mode="history", generate_kwargs=settings, batching=True, max_batch_size=THREADS
    )
    record.measure(
        f"{THREADS} threads beside one batch of {THREADS}",
        {"one batch": Policy(one, history_B), "threads": Threads(batching, history_B)},
        pairs=pairs,
        before_each=engine.flush_cache,
        settings={"batch": THREADS, "new_tokens": new_tokens, "batching": True},
        details=lambda base, other: overhead(base, other, tokens=THREADS * new_tokens),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="checkpoint of a chat model to serve (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, to see that everything runs")
    parser.add_argument("--batches", nargs="+", default=BATCHES, help="SEQUENCES:NEW_TOKENS of a call")
    parser.add_argument("--no-threads", dest="threads", action="store_false", help="leave the last line out")
    add_common_arguments(parser, pairs=7)
    args = parser.parse_args()
    batches = [tuple(map(int, word.split(":"))) for word in args.batches]
    set_list_to_stack(True).set()
    record = Recorder("policy", args.rows, args.max_repeats)
    with tempfile.TemporaryDirectory(prefix="policy-") as folder:
        model = str(make_tiny_model(Path(folder) / "model")) if args.tiny else args.model or str(smollm2_checkpoint())
        print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {model}")
        with AsyncSGLang.from_pretrained(model, device="cpu", api_key=False) as engine:
            for count, new_tokens in batches:
                measure_batch(engine, count, new_tokens, record, args.pairs)
            if args.threads:
                measure_threads(engine, 16, record, args.pairs)


if __name__ == "__main__":
    main()
