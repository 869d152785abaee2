"""The client process of ``agent_gateway.py``: reads a plan from standard input, runs it, and writes its times.

A plan has ``sessions``, ``spread_s`` (over how many seconds they begin) and ``stream``. A session has ``url``,
``headers`` and ``bodies``, which it sends one after the other; with ``replies`` it has one body, and each of the
replies follows the answer before it, as an agent's next message does. This file imports little: it starts in a moment.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp


async def run_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """Run all sessions; the seconds of all, per request, to each first token and between tokens; the last answers."""
    times: dict[str, Any] = {key: [[] for _ in plan["sessions"]] for key in ("each", "first", "between")}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        begun = time.perf_counter()
        answers = await asyncio.gather(
            *(_talk(http, session, plan, index, times) for index, session in enumerate(plan["sessions"]))
        )
        whole = time.perf_counter() - begun
    in_order = {key: [value for values in of_sessions for value in values] for key, of_sessions in times.items()}
    return {"whole": whole, "answers": answers, **in_order}


async def _talk(
    http: aiohttp.ClientSession, session: dict[str, Any], plan: dict[str, Any], index: int, times: dict[str, Any]
) -> Any:
    await asyncio.sleep(plan["spread_s"] * index / len(plan["sessions"]))
    bodies, answer = list(session["bodies"]), None
    for turn in range(max(len(bodies), 1 + len(session.get("replies", ())))):
        if turn >= len(bodies):  # what an agent says next
            said = [answer["choices"][0]["message"], {"role": "user", "content": session["replies"][turn - 1]}]
            bodies.append({**bodies[-1], "messages": [*bodies[-1]["messages"], *said]})
        begun = time.perf_counter()
        if plan["stream"]:
            await _read_stream(http, session, bodies[turn], times, index)
        else:
            answer = await _sent(http, session, bodies[turn])
        times["each"][index].append(time.perf_counter() - begun)
    return answer


async def _sent(http: aiohttp.ClientSession, session: dict[str, Any], body: Any) -> Any:
    async with http.post(session["url"], json=body, headers=session["headers"]) as response:
        response.raise_for_status()
        return await response.json()


async def _read_stream(
    http: aiohttp.ClientSession, session: dict[str, Any], body: dict[str, Any], times: dict[str, Any], index: int
) -> None:
    begun = time.perf_counter()
    first = last = 0.0
    body = {**body, "stream": True}
    async with http.post(session["url"], json=body, headers=session["headers"]) as response:
        response.raise_for_status()
        async for piece in response.content.iter_any():
            last = time.perf_counter()
            if not first and b"data:" in piece:
                first = last
    tokens = body.get("max_tokens") or body["sampling_params"]["max_new_tokens"]
    times["first"][index].append(first - begun)
    times["between"][index].append((last - first) / (tokens - 1))


if __name__ == "__main__":
    json.dump(asyncio.run(run_plan(json.load(sys.stdin))), sys.stdout)
