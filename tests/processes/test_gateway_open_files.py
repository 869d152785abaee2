"""A gateway that may open few files: turns wait for a connection to the server instead of failing."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.agent_runs import says
from tests.fake_sglang import FakeServer, FakeSettings

AGENTS = 46
SPARE = 6
"""Fewer than the agents: without a reserve nearly all turns find no descriptor for a request to the server."""


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
        command = f"ulimit -n 512; exec {sys.executable} -m torchrl_sglang gateway --url {server.url} --port 0"
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(["bash", "-c", command], **pipes) as run:
            try:
                assert run.stdout is not None
                url = run.stdout.readline().split()[1]
                limit = len(list(Path(f"/proc/{run.pid}/fd").iterdir())) + AGENTS + SPARE
                resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (limit, limit))
                assert set(asyncio.run(talk(url))) == {200}
            finally:
                run.terminate()
                _, told = run.communicate(timeout=60)
        assert "this process may open 512 files" in told
