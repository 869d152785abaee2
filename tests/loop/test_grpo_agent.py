"""``grpo_agent.py`` and ``AgentCollector`` with weight updates, against the shared server and a tiny random model."""

from __future__ import annotations

import asyncio
import copy
import itertools
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.agent_runs import ask_async, says
from tests.loop.rollout_cases import reference_log_probs
from tests.loop.sync_cases import load
from tests.loop.test_recipes import EXAMPLES, rows_of, run_here, samples_of, served_version
from torchrl_sglang import AgentCollector, AgentGateway, AsyncSGLang, SGLangWeightSyncScheme, recipes
from torchrl_sglang.server import SGLangServer

pytestmark = pytest.mark.usefixtures("needs_sglang")

# Three turns, edited history in the last one, and a reward that differs from run to run.
AGENT = """
from openai import AsyncOpenAI

async def run_agent(task, base_url, api_key):
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        messages = [{"role": "user", "content": task["query"]}]
        for turn in range(3):
            reply = await client.chat.completions.create(model="any", messages=messages, max_tokens=6)
            messages += [reply.choices[0].message.model_dump(), {"role": "user", "content": "Are you sure?"}]
            if turn == 1:
                messages = messages[:2] + [{"role": "user", "content": "Once more."}]
    length = sum(len(message["content"] or "") for message in messages)
    return {"reward": length / 100, "info": {"right": length % 2 == 0}}
"""


def settings(model: Path, url: str, folder: Path, *words: str) -> list[str]:
    return [
        *(f"model={model}", f"engine.url={url}", f"run.folder={folder}", "train.steps=2", "train.questions=2"),
        *("train.answers=4", "train.micro_batch=3", "train.lr=1e-2", *words),
    ]


def check_samples(model: Any, samples: list[dict[str, Any]]) -> None:
    """Log-probs of sampled tokens are the model's, of the first weights."""
    for sample in samples:
        written = torch.tensor(sample["weight_versions"]) >= 0
        assert written[0]
        ids = torch.tensor(sample["prompt_ids"] + sample["response_ids"])
        expected = reference_log_probs(model, ids)[len(sample["prompt_ids"]) :]
        torch.testing.assert_close(torch.tensor(sample["log_probs"])[written], expected[written], atol=1e-4, rtol=0)


def test_an_unchanged_agent_is_trained_on_what_its_model_sampled(
    pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "agent.py"
    file.write_text(AGENT)
    folder = tmp_path / "run"
    words = settings(tiny_llama, pristine_server.url, folder, f"agent.file={file}")
    assert run_here("grpo_agent", [*words, "evaluate.every=2", "evaluate.questions=2", "evaluate.answers=4"])
    rows, samples = rows_of(folder), samples_of(folder)
    assert [row["weight_version"] for row in rows] == [2, 3]
    assert served_version(pristine_server.url) == 3
    for row in rows:
        assert row["logprob_gap_max"] < 1e-3
        assert row["ess"] == pytest.approx(1, abs=1e-3)
        assert row["staleness_max"] == 0
        assert row["grad_norm"] > 0
    first = [sample for sample in samples if sample["step"] == 1]
    assert len(first) == 16, "two trajectories per run: the history was edited"
    check_samples(load(tiny_llama), first)
    assert [row["step"] for row in recipes.read_metrics(folder / "evaluations.csv")] == [0, 2]


@pytest.mark.slow
def test_the_examples_agent_runs_as_a_program_while_the_trainer_trains(
    pristine_server: SGLangServer, tiny_llama: Path, tmp_path: Path
) -> None:
    command = f"{sys.executable} {EXAMPLES / 'agents' / 'calculator_agent.py'} {{task}}"
    words = ["collect.ahead=1", "collect.concurrency=4", f"agent.command='{command}'", "train.questions=1"]
    assert run_here("grpo_agent", settings(tiny_llama, pristine_server.url, tmp_path, *words))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["staleness_max"] == 0
    assert rows[0]["logprob_gap_max"] < 1e-3


def test_an_update_while_agents_run_is_recorded_at_the_right_token(
    pristine_server: SGLangServer, tiny_llama: Path, tiny_llama_b: Path
) -> None:
    """Both turns of each run are sampled on either side of an update, and each agrees with its own weights."""
    first_turns, go_on = itertools.count(1), threading.Event()
    before, after = load(tiny_llama), load(tiny_llama_b)
    reached = threading.Event()

    async def agent(task: int, base_url: str, api_key: str) -> float:
        said = await ask_async(base_url, api_key, [says(f"What is {task}?")], ignore_eos=True)
        if next(first_turns) == 4:
            reached.set()
        await asyncio.to_thread(go_on.wait, 120)
        history = [says(f"What is {task}?"), says(said[0], "assistant"), says("Sure?")]
        return float(len((await ask_async(base_url, api_key, history))[0]) + next(first_turns) / 100)

    with AsyncSGLang.connect(pristine_server.url) as engine, AgentGateway(engine) as gateway:
        scheme = SGLangWeightSyncScheme(engine, model=copy.deepcopy(before))
        with AgentCollector(gateway, agent, [1, 2], group_size=2, weight_sync_schemes={"policy": scheme}) as collector:
            batches: list[Any] = []
            collecting = threading.Thread(target=lambda: batches.extend(collector))
            collecting.start()
            assert reached.wait(120)
            old = collector.policy_version
            collector.update_policy_weights_(after)
            assert collector.policy_version == old + 1
            go_on.set()
            collecting.join(120)
        scheme.shutdown()
    (batch,) = batches
    assert len(batch) == 4
    for row in batch.unbind(0):
        assert row["generation", "policy_version"] == old
        ids, mask, start = row["tokens", "full"], row["masks", "all_assistant_mask"], len(row["tokens", "prompt"])
        versions = torch.full_like(ids, -1)
        versions[start:] = row["generation", "weight_version"]
        assert versions[mask].unique().tolist() == [old, old + 1]
        for version, model in ((old, before), (old + 1, after)):
            at = versions == version
            expected = reference_log_probs(model, ids)
            torch.testing.assert_close(row["log_probs", "full"][at], expected[at], atol=1e-4, rtol=0)


def test_the_loop_of_the_docs_page_trains(pristine_server: SGLangServer, tiny_llama: Path) -> None:
    """Its code is run as it stands, with names for what is the reader's own."""
    page = (EXAMPLES.parent / "docs" / "agents.md").read_text()
    [code] = [each for each in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "train_step(" in each]
    seen: list[Any] = []
    said = itertools.count()

    async def my_agent(question: str, *, base_url: str, api_key: str) -> str:
        await ask_async(base_url, api_key, [says(question)])
        return f"{next(said) % 2}"

    with AsyncSGLang.connect(pristine_server.url) as servers:
        names = {
            "servers": servers,
            "tasks": [{"question": "?", "answer": "0"}] * 8,
            "my_agent": my_agent,
            "train_step": lambda actor, batch: seen.append(batch),
            "actor": load(tiny_llama),
        }
        exec(compile(code, "agents.md", "exec"), names)
    assert [len(batch) for batch in seen] == [32, 32]
    assert all(batch["advantage"].abs().min() > 0.5 for batch in seen)
    assert [batch["generation", "policy_version"].unique().item() for batch in seen] == [0, 1]
    assert served_version(pristine_server.url) == 2
