"""Coding agents of the command line, unmodified: each reads a file with its own tool, copies it, and ends.

The model's answers are scripted, since a random model calls no tool; all else is the real thing. The program that runs
them is ``examples/agents/command_line_agent.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.agents.conftest import CLIENT_TIMEOUT_S, HERE, complain, install
from tests.scripted_gateway import ScriptedGateway, calls
from torchrl_sglang.agents.collector.commands import agent_environment

pytestmark = [pytest.mark.agents, pytest.mark.timeout(600)]

EXAMPLE = HERE.parent.parent / "examples" / "agents" / "command_line_agent.py"
TASK = {
    "prompt": "Copy the number of secret.txt to answer.txt.",
    "files": {"secret.txt": "the number is 4711\n"},
    "check": "grep -q 4711 answer.txt",
}
RESULT = "<|im_start|>user\n<tool_response>"
THINKS = "<think>\nI look.\n</think>\n\nLooking.\n"
COPY = "cp secret.txt answer.txt"


@dataclass(frozen=True)
class Kind:
    """An agent.

    Attributes:
        command: its name for the example.
        postinstall: the script that its package would run after the installation, which npm may not.
        reads: the tool that reads a file, and the name of its argument.
        runs: the tool that runs a command, the name of its argument, and others that it needs.
    """

    command: str
    postinstall: str
    reads: tuple[str, str]
    runs: tuple[str, str, dict[str, Any]]


KINDS = {
    "claude_code": Kind(
        "claude",
        "@anthropic-ai/claude-code/install.cjs",
        ("Read", "file_path"),
        ("Bash", "command", {"description": "Copies"}),
    ),
    "codex": Kind("codex", "", ("exec_command", "cmd"), ("exec_command", "cmd", {})),
    "opencode": Kind("opencode", "opencode-ai/postinstall.mjs", ("read", "filePath"), ("bash", "command", {})),
    "qwen_code": Kind(
        "qwen", "", ("read_file", "file_path"), ("run_shell_command", "command", {"is_background": False})
    ),
}


def says(kind: Kind, prompt: str) -> str:
    """The model's answer: it reads the file, copies it, and says so."""
    done = prompt.count(RESULT)
    if done == 0:
        tool, argument = kind.reads
        folder = re.search(r"(/[\w/.-]+/work)\b", prompt)
        path = "cat secret.txt" if argument == "cmd" else f"{folder[1] if folder else '.'}/secret.txt"
        return THINKS + calls(tool, **{argument: path})
    if done == 1:
        tool, argument, more = kind.runs
        return calls(tool, **{argument: COPY, **more})
    return "<think>\nIt is done.\n</think>\n\nThe number is 4711."


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


def installed(programs: Path, name: str, postinstall: str) -> Path:
    """The folder of an agent's program."""
    if shutil.which("npm") is None:
        complain("npm is not installed")
    folder = programs / name
    folder.mkdir()
    shutil.copy(HERE / "requirements" / f"{name}.json", folder / "package.json")
    install(["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--silent"])
    if postinstall:
        script = folder / "node_modules" / postinstall
        subprocess.run(["node", str(script)], cwd=script.parent, check=True, capture_output=True)
    return folder / "node_modules" / ".bin"


@pytest.mark.parametrize("name", KINDS)
def test_an_agent_of_the_command_line_works_and_is_recorded_as_one_trajectory(name: str, programs: Path) -> None:
    kind = KINDS[name]
    path = installed(programs, name, kind.postinstall)
    with ScriptedGateway(lambda prompt: says(kind, prompt)) as gateway:
        session, url, key = gateway.session()
        variables = {
            n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "OPENAI", "ANTHROPIC", "CLAUDE"))
        }
        environment = agent_environment(variables, url, key)
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
        done = subprocess.run(
            [sys.executable, str(EXAMPLE), kind.command, json.dumps(TASK)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=CLIENT_TIMEOUT_S,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert done.stdout.splitlines()[-1] == "1.0", done.stdout[-2000:]
        assert "The number is 4711." in done.stdout
        assert [(each.path, each.answer[:500]) for each in gateway.refused()] == []
        (whole,), info = gateway.recorded(session)
    assert info.turns == 3
    assert sum(whole.loss_mask) == info.sampled_tokens
    results = [message["content"] for message in whole.messages if message["role"] == "tool"]
    assert len(results) == 2
    assert "4711" in str(results[0])
