"""The docs' agent of a framework is run by ``AgentCollector``, unmodified, with the Python of another environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.agents.conftest import python
from torchrl_sglang import AgentCollector, AgentGateway, SessionSettings
from torchrl_sglang.server import SGLangServer

pytestmark = [pytest.mark.agents, pytest.mark.timeout(1500)]

PAGE = Path(__file__).parents[2] / "docs" / "agents.md"
MAIN = """
import asyncio, itertools, json, os, sys, time
environment = os.environ
asyncio.run(run_agent(json.loads(sys.argv[1]), environment["OPENAI_BASE_URL"], environment["OPENAI_API_KEY"]))
print(time.time() % 1000)  # a random model is never right, and a group needs rewards that differ
"""


def test_the_framework_of_the_docs_page_is_collected(
    grammar_server: SGLangServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    [code] = re.findall(r"```python\n(from pydantic_ai.*?)```", PAGE.read_text(), flags=re.DOTALL)
    interpreter = python(tmp_path_factory.mktemp("frameworks"), "pydantic_ai_agent")[0]
    tasks = [{"question": f"What is {n} + 3?", "answer": str(n + 3)} for n in range(2)]
    settings = SessionSettings(generation={"max_new_tokens": 16})
    with (
        AgentGateway(grammar_server.url, settings=settings) as gateway,
        AgentCollector(gateway, [interpreter, "-c", code + MAIN, "{task}"], tasks, group_size=2) as collector,
    ):
        (batch,) = collector
        assert collector.stats()["failed_runs"] == 0, collector.failures
    assert batch["group_id"].tolist() == [0, 0, 1, 1]
    assert all("Add with the tool" in text for text in batch["text", "prompt"])
    assert all(int(mask.sum()) > 0 for mask in batch.get(("masks", "all_assistant_mask"), as_list=True))
