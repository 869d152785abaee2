"""A gateway that may open few files: turns wait for a connection to the server instead of failing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.agent_runs import says
from tests.fake_sglang import FakeServer, FakeSettings

LIMIT = 128
AGENTS = 40


@pytest.mark.slow
def test_turns_wait_for_a_connection_where_few_files_may_be_open(tiny_llama: Path) -> None:
    async def talk(url: str) -> list[Any]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=120) as client:

            async def agent() -> int:
                session = (await client.post(f"{url}/sessions", json={})).json()
                answer = await client.post(
                    f"{session['base_url']}/chat/completions",
                    json={"model": "m", "messages": [says("hi")], "max_tokens": 20},
                    headers={"Authorization": f"Bearer {session['api_key']}"},
                )
                return answer.status_code

            return list(await asyncio.gather(*[agent() for _ in range(AGENTS)]))

    with FakeServer(FakeSettings(model_path=tiny_llama, step_s=0.05)) as server:
        command = f"ulimit -n {LIMIT}; exec {sys.executable} -m torchrl_sglang gateway --url {server.url} --port 0"
        with subprocess.Popen(
            ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as run:
            try:
                assert run.stdout is not None
                url = run.stdout.readline().split()[1]
                assert set(asyncio.run(talk(url))) == {200}
            finally:
                run.terminate()
                _, told = run.communicate(timeout=60)
        assert f"this process may open {LIMIT} files" in told
