"""A gateway of another process before a real server: its agents run on while the trainer pushes weights."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.agent_runs import ask_async, says
from tests.loop.sync_cases import load
from torchrl_sglang import (
    AgentCollector,
    AsyncSGLang,
    RemoteGateway,
    SGLangWeightSyncScheme,
    SyncConfig,
    group_advantages,
    trajectories_to_batch,
)
from torchrl_sglang.server import SGLangServer

ATOL = 1e-4
BATCHES = 3
KEY = "the gateway's own key"


@contextmanager
def gateway_process(url: str, key_file: Path) -> Iterator[str]:
    key_file.write_text(KEY)
    words = ["gateway", "--url", url, "--port", "0", "--admin-key-file", str(key_file), "--override", "ignore_eos=true"]
    with subprocess.Popen([sys.executable, "-m", "torchrl_sglang", *words], stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            yield run.stdout.readline().split()[1]
        finally:
            run.terminate()
            run.wait(60)


def check(batch: Any, models: list[Any]) -> set[int]:
    """Every sampled token's log-prob is that of the model of its version; the versions that occur."""
    seen: set[int] = set()
    for row in batch.unbind(0):
        ids, trained = row["tokens", "full"], row["masks", "all_assistant_mask"]
        prompt = len(row["tokens", "prompt"])
        versions = torch.full_like(ids, -1)
        versions[prompt:] = row["generation", "weight_version"]
        assert (versions >= 0).equal(trained)
        for version in versions[trained].unique().tolist():
            with torch.no_grad():
                scores = models[version](ids[None]).logits[0].log_softmax(-1)
            expected = scores[:-1].gather(-1, ids[1:, None])[:, 0]
            of_version = versions[1:] == version
            assert (expected - row["log_probs", "full"][1:])[of_version].abs().max() < ATOL
            seen.add(version)
    return seen


@pytest.mark.slow
def test_agents_of_a_gateway_elsewhere_run_on_while_weights_are_pushed(
    pristine_server: SGLangServer, tiny_llama: Path, tiny_llama_b: Path, tokenizer: Any, tmp_path: Path
) -> None:
    first, second = load(tiny_llama), load(tiny_llama_b)
    models = [first, second, first, second]
    ends = iter(range(100))

    async def agent(task: Any, base_url: str, api_key: str) -> float:
        said = await ask_async(base_url, api_key, [says(task)], max_tokens=24)
        await ask_async(base_url, api_key, [says(task), says(said[0], "assistant"), says("Sure?")], max_tokens=24)
        return float(next(ends))

    with (
        gateway_process(pristine_server.url, tmp_path / "key") as url,
        AsyncSGLang.connect(pristine_server.url) as servers,
        RemoteGateway(url, admin_key=KEY) as gateway,
        AgentCollector(
            gateway,
            agent,
            [f"task {number}" for number in range(2 * BATCHES)],
            group_size=3,
            groups_per_batch=2,
            ahead=1,
            max_staleness=1,
            weight_sync_schemes={"policy": SGLangWeightSyncScheme(servers, config=SyncConfig(pause="abort"))},
        ) as collector,
    ):
        seen = []
        for number, batch in enumerate(collector, 1):
            assert batch.shape == (6,)
            assert collector.policy_version - int(batch["generation", "policy_version"].min()) <= 1
            seen.append(check(group_advantages(batch), models))
            collector.update_policy_weights_(models[number])
        assert len(seen) == BATCHES
        assert set().union(*seen) >= {0, 1}
        assert collector.stats()["failed_runs"] == 0

        # a harness that makes its sessions itself; the trainer reads them as JSON
        def harness(reward: float) -> None:
            session = gateway.create_session(tags={"group_id": 5, "task": "by a harness"})
            asyncio.run(ask_async(session.base_url, session.api_key, [says("hi")], max_tokens=8))
            gateway.reward(session.id, reward)

        threads = [threading.Thread(target=harness, args=(float(number),)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        leaves = [leaf for each in gateway.list_sessions("finished") for leaf in gateway.trajectories(each.id)]
        read = json.loads(json.dumps([leaf.as_json() for leaf in leaves]))
        batch = trajectories_to_batch(read, tokenizer=tokenizer)
        assert batch["group_id"].tolist() == [5, 5]
        assert check(batch, models) == {BATCHES}
        for each in gateway.list_sessions():
            gateway.delete(each.id)
