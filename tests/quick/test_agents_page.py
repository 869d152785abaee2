"""The snippets of docs/agents.md, and that of agents of the command line, run as they stand, before a fake server."""

from __future__ import annotations

import ast
import asyncio
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.agent_runs import ask_async, says
from tests.fake_sglang import FakeServer
from torchrl_sglang import AgentGateway, AsyncSGLang, SessionSettings, SGLangWeightSyncScheme, SyncConfig

DOCS = Path(__file__).parents[2] / "docs"
KEY = "the gateway's key"


def snippets() -> list[str]:
    """Without those that need a framework, which are run by make test-agents."""
    commands = (DOCS / "agent_frameworks.md").read_text().partition("\n## A verifiers environment")[0]
    text = (DOCS / "agents.md").read_text() + commands
    return [
        each for each in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if not needs_more(each)
    ]


def needs_more(code: str) -> bool:
    """Whether a snippet imports a package that is not installed here."""
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in names]
    return any(find_spec(module.split(".")[0]) is None for module in modules)


async def my_agent(question: str, *, base_url: str, api_key: str) -> str:
    return "".join(await ask_async(base_url, api_key, [says(question)]))


def test_each_snippet_runs(fake: FakeServer, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    key_file = tmp_path / "gateway.key"
    key_file.write_text(KEY)
    trained: list[Any] = []
    names: dict[str, Any] = {
        "my_agent": my_agent,
        "tasks": [{"question": f"{n} + 1?", "answer": str(n)} for n in range(2)],
        "train_step": lambda actor, batch: trained.append(batch),
        "actor": model,
        "tokenizer": tokenizer,
        "torch": torch,
        "SessionSettings": SessionSettings,
        "print": lambda *values: None,
    }
    trainer = AsyncSGLang.connect(fake.url)
    # in place of defaults that need a real server: it computes other log-probs than the trainer's model
    names["scheme"] = SGLangWeightSyncScheme(trainer, config=SyncConfig(verify="off", transport="http"))
    replaced = {
        '"http://127.0.0.1:30000"': repr(fake.url),
        "SGLangWeightSyncScheme(servers)": "scheme",
        '"gateway.key"': repr(str(key_file)),
        # the answers of the fake server are all wrong
        "timeout_s=600,": "timeout_s=600, skip_equal=False,",
    }
    with AgentGateway(fake.url, admin_key=KEY) as elsewhere:
        replaced['"http://10.0.0.7:8000"'] = repr(elsewhere.url)
        for number, code in enumerate(snippets()):
            if "list_sessions" in code:  # someone else's runs
                for reward in (0.0, 1.0):
                    session = elsewhere.create_session(tags={"group_id": 3})
                    asyncio.run(ask_async(session.base_url, session.api_key, [says("hi")]))
                    elsewhere.reward(session.id, reward)
            for old, new in replaced.items():
                code = code.replace(old, new)
            exec(compile(code, f"snippet {number}", "exec"), names)
            if "collector = " in code:
                names["collector"].shutdown()
            if "AgentGateway(" in code:
                names["gateway"] = elsewhere  # the snippet's own is closed at its end
        assert elsewhere.list_sessions() == []
    assert len(trained) == 1
    assert trained[0]["advantage"].shape == (16, 1, 1)
    assert sorted(names["batch"]["advantage"].flatten().tolist()) == pytest.approx([-(2**-0.5), 2**-0.5])
    row = {"turn": torch.tensor([-1, 0, 0, -1, 1]), "info": {"turn_rewards": [0.5, 2.0]}}
    assert names["token_advantages"](row).tolist() == [0, 0.5, 0.5, 0, 2]
    trainer.shutdown()
