"""Measures what the gateway adds to bare `/generate` requests with the same ids.

    python benchmarks/agent_gateway.py                       # launches a server with a tiny model
    python benchmarks/agent_gateway.py --url http://host:30000 --sessions 64 --pairs 9

The two run alternately, so that other programs on the machine slow both alike:

    raw      64 tasks post the same token ids to `/generate`, log-probs included, with one async HTTP client
    gateway  64 agents, each with a session of its own, post the messages whose rendering these ids are

Both clients run in a process of their own. Printed are the medians over the pairs: throughput gateway / raw (target:
0.95 or more), the difference of the median latency (target: 3 ms or less), the gateway's CPU time per turn. All ask
at the same moment, so each turn also waits for the gateway's work on those before it. Then the same with requests
that arrive one after the other, over twice the time that raw took: the machine is half idle. Then the memory of 1,000
idle sessions with one turn each (target: less than 200 MB), and how many tokens of the second turn's prompt came from
the prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

IDLE_SESSIONS = 1000
QUESTION = "How are you today? " * 4


async def ask_all(plan: dict[str, Any]) -> dict[str, Any]:
    """Run one turn of every session, begun over ``spread_s`` seconds; the seconds of all, and of each."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as http:

        async def ask(index: int, call: dict[str, Any]) -> tuple[float, Any]:
            await asyncio.sleep(plan["spread_s"] * index / len(plan["calls"]))
            begun = time.perf_counter()
            answer = await http.post(call["url"], content=call["body"], headers=call["headers"])
            answer.raise_for_status()
            return time.perf_counter() - begun, answer.json()

        begun = time.perf_counter()
        answers = await asyncio.gather(*(ask(index, call) for index, call in enumerate(plan["calls"])))
        whole = time.perf_counter() - begun
    return {"whole": whole, "each": [seconds for seconds, _ in answers], "answers": [answer for _, answer in answers]}


def run_client(calls: list[dict[str, Any]], spread_s: float = 0.0) -> dict[str, Any]:
    """The same in a process of its own, which imports little: this file imports torchrl_sglang where it is needed."""
    command = [sys.executable, __file__, "--as-client"]
    done = subprocess.run(
        command, input=json.dumps({"calls": calls, "spread_s": spread_s}), capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


class Gateway:
    """A gateway in a process of its own, and sessions on it."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "torchrl_sglang", "gateway", "--url", url, "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("ready"):
            raise SystemExit("the gateway did not start")
        self.url = line.split()[1]
        self.usage = psutil.Process(self._process.pid)

    def session(self) -> dict[str, str]:
        return dict(httpx.post(f"{self.url}/sessions", trust_env=False).json())

    def trajectories(self, session: dict[str, str]) -> list[dict[str, Any]]:
        headers = {"authorization": f"Bearer {session['api_key']}"}
        url = f"{self.url}/sessions/{session['id']}/trajectories"
        return list(httpx.get(url, headers=headers, trust_env=False).json())

    def cpu_s(self) -> float:
        times = self.usage.cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)


def chat_call(session: dict[str, str], messages: list[dict[str, Any]], new_tokens: int) -> dict[str, Any]:
    body = {"model": "m", "messages": messages, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    headers = {"authorization": f"Bearer {session['api_key']}", "content-type": "application/json"}
    return {"url": f"{session['base_url']}/chat/completions", "body": json.dumps(body), "headers": headers}


def raw_call(url: str, ids_T: list[int], new_tokens: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": ids_T, "sampling_params": sampling, "return_logprob": True}
    return {"url": f"{url}/generate", "body": json.dumps(body), "headers": {"content-type": "application/json"}}


def measure_pairs(url: str, gateway: Gateway, sessions: int, pairs: int, new_tokens: int) -> None:
    prompts = [[{"role": "user", "content": f"{QUESTION}{i}"}] for i in range(sessions)]
    made = [gateway.session() for _ in prompts]
    run_client([chat_call(s, p, new_tokens) for s, p in zip(made, prompts, strict=True)])
    ids_B_T = [leaf["token_ids"][: leaf["loss_mask"].index(1)] for s in made for leaf in gateway.trajectories(s)[:1]]
    raw_calls = [raw_call(url, ids_T, new_tokens) for ids_T in ids_B_T]
    run_client(raw_calls)

    def gateway_calls() -> list[dict[str, Any]]:
        return [chat_call(gateway.session(), prompt, new_tokens) for prompt in prompts]

    print("all at once:")
    whole_s = _measure(url, gateway, raw_calls, gateway_calls, pairs, spread_s=0.0)
    print(f"over {2 * whole_s:.1f} s, twice the time that raw took:")
    _measure(url, gateway, raw_calls, gateway_calls, pairs, spread_s=2 * whole_s)


def _measure(
    url: str,
    gateway: Gateway,
    raw_calls: list[dict[str, Any]],
    gateway_calls: Callable[[], list[dict[str, Any]]],
    pairs: int,
    *,
    spread_s: float,
) -> float:
    """Run the pairs and print their medians; returns the median seconds of raw."""
    from torchrl_sglang import SGLangClient
    from torchrl_sglang.protocol.control import build_flush

    server = SGLangClient(url)
    ratios, differences, cpu, whole = [], [], [], []
    for pair in range(pairs):
        calls = {"raw": raw_calls, "gateway": gateway_calls()}
        results = {}
        for name in ("raw", "gateway") if pair % 2 else ("gateway", "raw"):
            server.send(build_flush())
            before = gateway.cpu_s()
            results[name] = run_client(calls[name], spread_s)
            if name == "gateway":
                cpu.append((gateway.cpu_s() - before) / len(raw_calls))
        whole.append(results["raw"]["whole"])
        ratios.append(results["raw"]["whole"] / results["gateway"]["whole"])
        medians = {name: statistics.median(result["each"]) for name, result in results.items()}
        differences.append(medians["gateway"] - medians["raw"])
        print(
            f"  pair {pair + 1}: raw {results['raw']['whole']:.3f} s, gateway {results['gateway']['whole']:.3f} s, "
            f"median latency {1000 * medians['raw']:.0f} and {1000 * medians['gateway']:.0f} ms",
            flush=True,
        )
    if not spread_s:
        print(f"  throughput, gateway / raw   {statistics.median(ratios):.3f}   (target: 0.95 or more)")
    print(f"  median latency, difference  {1000 * statistics.median(differences):+.1f} ms (target: 3 ms or less)")
    print(f"  CPU time of the gateway     {1000 * statistics.median(cpu):.2f} ms per turn", flush=True)
    return statistics.median(whole)


def measure_idle_sessions(gateway: Gateway, new_tokens: int) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    before = gateway.usage.memory_info().rss
    made = [gateway.session() for _ in range(IDLE_SESSIONS)]
    for start in range(0, IDLE_SESSIONS, 100):
        run_client([chat_call(session, messages, new_tokens) for session in made[start : start + 100]])
    grown = (gateway.usage.memory_info().rss - before) / 2**20
    print(f"{IDLE_SESSIONS} idle sessions          {grown:.0f} MB with a turn each (target: less than 200 MB)")


def measure_prefix_cache(gateway: Gateway, new_tokens: int) -> None:
    session = gateway.session()
    messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
    first = run_client([chat_call(session, messages, new_tokens)])["answers"][0]
    messages += [first["choices"][0]["message"], {"role": "user", "content": "More."}]
    second = run_client([chat_call(session, messages, new_tokens)])["answers"][0]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    print(f"prefix cache                {cached} tokens of a first turn of {first['usage']['total_tokens']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: launches one with a tiny model")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--as-client", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_client:
        print(json.dumps(asyncio.run(ask_all(json.load(sys.stdin)))))
        return
    server = None
    if args.url is None:
        from torchrl_sglang import ServerConfig, SGLangServer
        from torchrl_sglang.testing import make_tiny_model

        model = make_tiny_model(Path(tempfile.mkdtemp()) / "tiny")
        flags = ("--max-total-tokens", "40000")
        server = SGLangServer(ServerConfig(model=str(model), device="cpu", extra_args=flags)).start()
    url = args.url or server.url  # type: ignore[union-attr]
    gateway = Gateway(url)
    try:
        load = os.getloadavg()[0]
        print(f"{args.sessions} sessions, {args.new_tokens} new tokens, {args.pairs} pairs; load {load:.1f}")
        measure_pairs(url, gateway, args.sessions, args.pairs, args.new_tokens)
        measure_idle_sessions(gateway, 8)
        measure_prefix_cache(gateway, args.new_tokens)
    finally:
        gateway.stop()
        if server is not None:
            server.stop(kill=True)


if __name__ == "__main__":
    main()
