"""The docs' verifiers environment is run by ``AgentCollector``, unmodified, with the Python of another environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.agents.conftest import python
from torchrl_sglang import AgentCollector, AgentGateway
from torchrl_sglang.server import SGLangServer

pytestmark = [pytest.mark.agents, pytest.mark.timeout(1500)]

PAGE = Path(__file__).parents[2] / "docs" / "agent_frameworks.md"


def test_the_environment_of_the_docs_page_is_collected(
    grammar_server: SGLangServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    [code] = re.findall(r"```python\n(# run_environment.py.*?)```", PAGE.read_text(), flags=re.DOTALL)
    interpreter = python(tmp_path_factory.mktemp("frameworks"), "verifiers_envs")[0]
    tasks = [{"question": f"What is {n} + 3?", "answer": str(n + 3)} for n in range(2)]
    command = [interpreter, "-c", code, "{task}"]
    with (
        AgentGateway(grammar_server.url) as gateway,
        AgentCollector(gateway, command, tasks, group_size=2, skip_equal=False) as collector,
    ):
        (batch,) = collector
        assert collector.stats()["failed_runs"] == 0, collector.failures
    assert batch["group_id"].tolist() == [0, 0, 1, 1]
    assert all("+ 3?" in text for text in batch["text", "prompt"])
    assert set(batch["next", "reward"].flatten().tolist()) <= {0.0, 1.0}
