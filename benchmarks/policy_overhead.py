"""What `SGLangWrapper` costs over one bare HTTP request with the same batch.

    python benchmarks/policy_overhead.py                                  # SmolLM2-135M on 2 cores: about 15 minutes
    python benchmarks/policy_overhead.py --batches 256 --new-tokens 4     # another 15

What is compared, in turns, so that other work on the machine hurts both alike:

    raw      the same ids and settings posted with `requests`, the answer parsed as JSON and nothing else
    tokens   the policy on token ids: TensorDict in, TensorDict with tokens, masks, log-probs and Generation out
    history  the policy on chats: the same, and the chat template, tokenizer, decoding and the grown conversation

Each line is the median over the pairs of policy / raw. Aimed at: 1.03 or less. Where runs scatter, `cpu` says more: the
processor time that this process spends more than bare requests do, in percent of the time a call takes. The last line
compares 16 threads that call the policy with one prompt each, under ``batching=True``, with one call of 16 prompts:
aimed at 1.

The wrapper's own work grows with the number of sequences and not with their length: real responses are longer than the
ones here, and cost more time at the server and the same in the wrapper.
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
    """Many threads that call the policy with one prompt each, as environments in threads do."""

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
    """What the policy sends for these chats."""
    prompts = policy(history_B.copy()).get(("tokens", "prompt"), as_list=True)
    return [prompt.tolist() for prompt in prompts]


def run(engine: AsyncSGLang, given: argparse.Namespace) -> None:
    settings = {"max_new_tokens": given.new_tokens, "temperature": 0.0, "ignore_eos": True}
    sampling = SamplingParams(**settings)
    url = engine.pool.clients[0].url
    by_history = SGLangWrapper(engine, input_mode="history", generate_kwargs=settings)
    by_tokens = SGLangWrapper(engine, input_mode="tokens", generate_kwargs=settings)
    print(f"{'':34} {'ratio':>6}  {'quartiles':>15}")
    for count in given.batches:
        history_B = chats(count)
        ids_B_T = ids_of(by_history, history_B)
        tokens_B = lazy_stack([TensorDict(tokens=TensorDict(prompt=torch.tensor(ids_T))) for ids_T in ids_B_T])
        raw = Raw([url], ids_B_T, sampling)
        for name, policy, data_B in (("tokens", by_tokens, tokens_B), ("history", by_history, history_B)):
            title = f"batch of {count}: {name} / raw"
            compare(title, raw, Policy(policy, data_B), engine.flush_cache, count * given.new_tokens, given.pairs)
    history_B = chats(THREADS)
    batching = SGLangWrapper(
        engine, input_mode="history", generate_kwargs=settings, batching=True, max_batch_size=THREADS
    )
    compare(
        f"{THREADS} threads / one batch of {THREADS}",
        Policy(by_history, history_B),
        Threads(batching, history_B),
        engine.flush_cache,
        THREADS * given.new_tokens,
        given.pairs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint of a chat model to serve (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="sequences per call")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    set_list_to_stack(True).set()
    model = given.model or str(smollm2_checkpoint())
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {given.new_tokens} new tokens each")
    with AsyncSGLang.from_pretrained(model, device="cpu") as engine:
        run(engine, given)


if __name__ == "__main__":
    main()
