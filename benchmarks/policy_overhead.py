"""Measures the overhead of `SGLangWrapper` over one bare HTTP request with the same batch.

    python benchmarks/policy_overhead.py                                  # SmolLM2-135M on 2 cores: about 15 minutes
    python benchmarks/policy_overhead.py --batches 256 --new-tokens 4     # another 15

They run alternately, so that other programs on the machine slow all alike:

    raw      post the same ids and settings with `requests`; the answer is only parsed as JSON
    tokens   the policy on token ids: TensorDict in, TensorDict with tokens, masks, log-probs and Generation out
    history  the policy on chats: the same, plus chat template, tokenizer, decoding and the extended conversation

Each line is the median over the pairs of policy / raw. Target: 1.03 or less. If runs vary, `cpu` is more reliable: the
CPU time of this process beyond that of bare requests, in percent of the time of a call. The last line compares 16
threads that call the policy with one prompt each, with ``batching=True``, with one call of 16 prompts. Target: 1.

The wrapper's own work grows with the number of sequences, not with their length: real responses are longer than those
here and take more time on the server, but not in the wrapper.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from generate_throughput import Raw, compare
from tensordict import TensorDict, TensorDictBase, lazy_stack, set_list_to_stack
from torchrl.data.llm import History
from torchrl.modules.llm import ChatHistory

from torchrl_sglang import AsyncSGLang, SamplingParams, SGLangWrapper, smollm2_checkpoint

THREADS = 16


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


def run(engine: AsyncSGLang, args: argparse.Namespace) -> None:
    settings = {"max_new_tokens": args.new_tokens, "temperature": 0.0, "ignore_eos": True}
    sampling = SamplingParams(**settings)
    url = engine.pool.clients[0].url
    by_history = SGLangWrapper(engine, input_mode="history", generate_kwargs=settings)
    by_tokens = SGLangWrapper(engine, input_mode="tokens", generate_kwargs=settings)
    print(f"{'':34} {'ratio':>6}  {'quartiles':>15}")
    for count in args.batches:
        history_B = chats(count)
        ids_B_T = ids_of(by_history, history_B)
        tokens_B = lazy_stack([TensorDict(tokens=TensorDict(prompt=torch.tensor(ids_T))) for ids_T in ids_B_T])
        raw = Raw([url], ids_B_T, sampling)
        for name, policy, data_B in (("tokens", by_tokens, tokens_B), ("history", by_history, history_B)):
            title = f"batch of {count}: {name} / raw"
            compare(title, raw, Policy(policy, data_B), engine.flush_cache, count * args.new_tokens, args.pairs)
    history_B = chats(THREADS)
    batching = SGLangWrapper(
        engine, input_mode="history", generate_kwargs=settings, batching=True, max_batch_size=THREADS
    )
    compare(
        f"{THREADS} threads / one batch of {THREADS}",
        Policy(by_history, history_B),
        Threads(batching, history_B),
        engine.flush_cache,
        THREADS * args.new_tokens,
        args.pairs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="checkpoint of a chat model to serve (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="sequences per call")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    set_list_to_stack(True).set()
    model = args.model or str(smollm2_checkpoint())
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {args.new_tokens} new tokens each")
    with AsyncSGLang.from_pretrained(model, device="cpu", api_key=False) as engine:
        run(engine, args)


if __name__ == "__main__":
    main()
