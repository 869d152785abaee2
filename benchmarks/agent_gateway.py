"""Measures what the gateway adds to bare `/generate` requests with the same ids.

    python benchmarks/agent_gateway.py                       # launches a server with a tiny model
    python benchmarks/agent_gateway.py --url http://host:30000 --sessions 64 --pairs 9
    python benchmarks/agent_gateway.py --server-cores 1      # the first core for the server, the others for the rest

The two run alternately, so that other programs on the machine slow both alike:

    raw      64 tasks post the same token ids to `/generate`, log-probs included, with one async HTTP client
    gateway  64 agents, each with a session of its own, post the messages whose rendering these ids are

Both clients run in a process of their own. Printed are the medians over the pairs: throughput gateway / raw (target:
0.95 or more), the difference of the median latency (target: 3 ms or less), the CPU time per turn of
the gateway, the client and the whole machine, which should run nothing else. There are four loads:

    at once      all ask at the same moment, so each turn also waits for the gateway's work on those before it
    turn by turn each session has several turns, one after the other, as an agent has: with answers of equal length,
                 and of lengths that differ between the sessions
    steady       requests arrive one after the other, at a quarter of the rate that raw reaches when all ask at once
    streamed     at once, answered in pieces: the time to the first token, and between tokens

What each can tell: in the first two the machine is full, and a request waits for all others, so their latency is the
number of sessions over the throughput: a percent of the throughput of 64 sessions is 5 to 8 ms, which a few pairs do
not resolve. They tell the throughput. Answers of equal length keep raw's sessions in step: all turns end together, and
the next ones begin as one batch, while the gateway's begin over the time that it works on 64 of them. Under the steady
load, of short answers, a request waits for few others. It has 128 requests, each of which is compared with itself. The
median of these differences tells the latency; what is printed behind it is how far it differs between the pairs. A
gateway that shares cores with the server also takes time from it, which ``--server-cores`` excludes.

Then the memory of 1,000 idle sessions with one turn each (target: less than 200 MB), and how many tokens of the second
turn's prompt came from the prefix cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

IDLE_SESSIONS = 1000
STEADY_SESSIONS, STEADY_SHARE, STEADY_TOKENS = 128, 0.25, 8
QUESTION = "How are you today? " * 4
REPLIES = ("Tell me more.", "And then?")
CLIENT = Path(__file__).with_name("agent_client.py")

Sessions = list[dict[str, Any]]


def run_client(sessions: Sessions, *, spread_s: float = 0.0, stream: bool = False) -> dict[str, Any]:
    """Run sessions in a client process; its times, and the CPU seconds of the client and of the whole machine."""
    plan = json.dumps({"sessions": sessions, "spread_s": spread_s, "stream": stream})
    client, machine = _children_s(), _machine_s()
    done = subprocess.run([sys.executable, str(CLIENT)], input=plan, capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout), "client": _children_s() - client, "machine": _machine_s() - machine}


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _machine_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


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
        self._http = httpx.Client(trust_env=False, timeout=60)

    def session(self, question: str, new_tokens: int, replies: tuple[str, ...] = ()) -> dict[str, Any]:
        """A new session, and what its agent sends."""
        made = self._http.post(f"{self.url}/sessions").json()
        sampling = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"model": "m", "messages": [{"role": "user", "content": question}], **sampling}
        headers = {"authorization": f"Bearer {made['api_key']}"}
        url = f"{made['base_url']}/chat/completions"
        return {"id": made["id"], "url": url, "headers": headers, "bodies": [body], "replies": replies}

    def prompts(self, session: dict[str, Any]) -> list[list[int]]:
        """The token ids of each prompt that a session has sent."""
        url = f"{self.url}/sessions/{session['id']}/trajectories"
        (leaf,) = self._http.get(url, headers=session["headers"]).json()
        mask = [0, *leaf["loss_mask"]]
        return [leaf["token_ids"][:i] for i in range(len(mask) - 1) if mask[i + 1] and not mask[i]]

    def cpu_s(self) -> float:
        times = self.usage.cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        self._http.close()
        self._process.terminate()
        self._process.wait(timeout=60)


def raw_session(url: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """The requests that the gateway sends."""
    from torchrl_sglang import SamplingParams
    from torchrl_sglang.protocol.generate import build_generate

    sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
    bodies = [build_generate([ids_T], sampling, request_ids=[uuid.uuid4().hex]).body for ids_T in prompts]
    return {"url": f"{url}/generate", "headers": {}, "bodies": bodies}


def measure_pairs(
    url: str, gateway: Gateway, num_sessions: int, pairs: int, new_tokens: int, loads: list[str] | None
) -> None:
    def agents(
        replies: tuple[str, ...] = (), *, count: int = num_sessions, tokens: int = new_tokens, spread: bool = False
    ) -> Sessions:
        """Sessions with answers of ``tokens`` tokens; with ``spread``, of half of that to one and a half times that."""
        lengths = [tokens // 2 + tokens * i // count if spread else tokens for i in range(count)]
        return [gateway.session(f"{QUESTION}{i}", length, replies) for i, length in enumerate(lengths)]

    def raw(replies: tuple[str, ...] = (), **options: Any) -> Sessions:
        """The same ids; a first run of the agents shows them, and warms both up."""
        made = agents(replies, **options)
        run_client(made)
        return [raw_session(url, gateway.prompts(each), each["bodies"][0]["max_tokens"]) for each in made]

    def wants(name: str) -> bool:
        return loads is None or name in loads

    single = raw()
    run_client(single)
    print("at once:")
    whole_s = _measure(url, gateway, single, agents, pairs)
    if wants("turns"):
        print(f"turn by turn, {1 + len(REPLIES)} turns each:")
        _measure(url, gateway, raw(REPLIES), lambda: agents(REPLIES), pairs)
        print(f"turn by turn, {1 + len(REPLIES)} turns each, of {new_tokens // 2} to {new_tokens * 3 // 2} tokens:")
        _measure(url, gateway, raw(REPLIES, spread=True), lambda: agents(REPLIES, spread=True), pairs)
    if wants("steady"):
        spread_s = whole_s * STEADY_SESSIONS / num_sessions / STEADY_SHARE
        print(f"steady, {STEADY_SESSIONS} requests of {STEADY_TOKENS} new tokens over {spread_s:.1f} s:")
        few: dict[str, int] = {"count": STEADY_SESSIONS, "tokens": STEADY_TOKENS}
        _measure(url, gateway, raw(**few), lambda: agents(**few), pairs, spread_s=spread_s)
    if wants("streamed"):
        print("streamed, at once:")
        _measure(url, gateway, single, agents, pairs, stream=True)


def _measure(
    url: str,
    gateway: Gateway,
    raw: Sessions,
    agents: Callable[[], Sessions],
    pairs: int,
    *,
    spread_s: float = 0.0,
    stream: bool = False,
) -> float:
    """Run the pairs and print their medians; returns the median seconds of raw."""
    from torchrl_sglang import SGLangClient
    from torchrl_sglang.protocol.control import build_flush

    server = SGLangClient(url)
    turns = sum(len(session["bodies"]) for session in raw)
    results: dict[str, list[dict[str, Any]]] = {"raw": [], "gateway": []}
    for pair in range(pairs):
        sessions = {"raw": raw, "gateway": agents()}
        for name in ("raw", "gateway") if pair % 2 else ("gateway", "raw"):
            server.send(build_flush())
            before = gateway.cpu_s()
            result = run_client(sessions[name], spread_s=spread_s, stream=stream)
            results[name].append({**result, "cpu": (gateway.cpu_s() - before) / turns})

    def median(of: Callable[[dict[str, Any]], float], name: str) -> float:
        return statistics.median(map(of, results[name]))

    def difference(key: str) -> str:
        both = zip(*(results[name] for name in ("gateway", "raw")), strict=True)
        values = [
            statistics.median(1000 * (one - other) for one, other in zip(g[key], r[key], strict=True)) for g, r in both
        ]
        raw_ms = 1000 * median(lambda r: statistics.median(r[key]), "raw")
        return f"{statistics.median(values):+7.1f} ms ({min(values):+.1f} to {max(values):+.1f}; raw {raw_ms:.1f} ms)"

    if not spread_s:
        ratios = [r["whole"] / g["whole"] for r, g in zip(results["raw"], results["gateway"], strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"  throughput, gateway / raw   {statistics.median(ratios):.3f} ({spread}; target: 0.95 or more)")
    print(f"  latency, median difference  {difference('each')}{', target: 3 ms or less' if spread_s else ''}")
    if stream:
        print(f"  to the first token          {difference('first')}")
        print(f"  between tokens              {difference('between')}")
    print(f"  CPU time of the gateway     {1000 * median(lambda r: r['cpu'], 'gateway'):.2f} ms per turn")
    for name in results:
        busy = median(lambda r: 1000 * r["machine"] / turns, name)
        client = median(lambda r: 1000 * r["client"] / turns, name)
        whole = median(lambda r: r["whole"], name)
        print(f"  {name:8} {whole:.3f} s, CPU time per turn {busy:.2f} ms, of it {client:.2f} ms the client's process")
    sys.stdout.flush()
    return median(lambda r: r["whole"], "raw")


def measure_idle_sessions(gateway: Gateway, new_tokens: int) -> None:
    before = gateway.usage.memory_info().rss
    made = [gateway.session(QUESTION, new_tokens) for _ in range(IDLE_SESSIONS)]
    for start in range(0, IDLE_SESSIONS, 100):
        run_client(made[start : start + 100])
    grown = (gateway.usage.memory_info().rss - before) / 2**20
    print(f"{IDLE_SESSIONS} idle sessions          {grown:.0f} MB with a turn each (target: less than 200 MB)")


def measure_prefix_cache(gateway: Gateway, new_tokens: int) -> None:
    session = gateway.session(QUESTION, new_tokens, REPLIES[:1])
    (second,) = run_client([session])["answers"]
    first_tokens = len(gateway.prompts(session)[0]) + new_tokens
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    print(f"prefix cache                {cached} tokens of a first turn of {first_tokens}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: launches one with a tiny model")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--loads",
        nargs="+",
        choices=("turns", "steady", "streamed"),
        help='loads besides "at once"; default: all, and the idle sessions',
    )
    parser.add_argument(
        "--server-cores",
        type=int,
        help="this many cores for the server, all others for gateway and client; one given by --url must run on them",
    )
    args = parser.parse_args()
    server = None
    cores = sorted(os.sched_getaffinity(0))
    if args.server_cores is not None and not 0 < args.server_cores < len(cores):
        parser.error(f"--server-cores must be between 1 and {len(cores) - 1}: gateway and client need a core, too")
    if args.url is None:
        from torchrl_sglang import ServerConfig, SGLangServer
        from torchrl_sglang.testing import make_tiny_model

        model = make_tiny_model(Path(tempfile.mkdtemp()) / "tiny")
        env = {}
        if args.server_cores is not None:
            env = {"OMP_NUM_THREADS": str(args.server_cores)}
            os.sched_setaffinity(0, cores[: args.server_cores])  # its processes inherit it
        flags = ("--max-total-tokens", "120000")
        server = SGLangServer(ServerConfig(model=str(model), device="cpu", extra_args=flags, env=env)).start()
    if args.server_cores is not None:
        os.sched_setaffinity(0, cores[args.server_cores :])
    url = args.url or server.url  # type: ignore[union-attr]
    gateway = Gateway(url)
    try:
        load = os.getloadavg()[0]
        print(f"{args.sessions} sessions, {args.new_tokens} new tokens, {args.pairs} pairs; load {load:.1f}")
        measure_pairs(url, gateway, args.sessions, args.pairs, args.new_tokens, args.loads)
        if args.loads is None:
            measure_idle_sessions(gateway, 8)
            measure_prefix_cache(gateway, args.new_tokens)
    finally:
        gateway.stop()
        if server is not None:
            server.stop(kill=True)


if __name__ == "__main__":
    main()
