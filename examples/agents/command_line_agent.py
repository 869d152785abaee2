"""Claude Code, Codex, OpenCode or Qwen Code on one task, in a folder of its own: an agent to train, as it is installed.

    python command_line_agent.py claude TASK

TASK is JSON: ``{"prompt": "Fix the bug", "files": {"add.py": "..."}, "check": "python -m pytest -q"}``. The agent works
in a new folder with these files. The reward, in the last line of the output, is 1 if the check succeeds there, else 0.
``AgentCollector`` runs it as a command line, and sets the gateway's address and key in the environment:

    AgentCollector(gateway, ["python", "command_line_agent.py", "claude", "{task}"], tasks, group_size=8)

The agent may run any command without asking: start the trainer in a container. It gets an empty home folder, so it
neither finds your login nor changes your settings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = "policy"  # any name: the gateway has one model


def claude(prompt: str) -> tuple[list[str], dict[str, str]]:
    """``npm install @anthropic-ai/claude-code``. It finds ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY."""
    few_tools = ["--tools", "Bash,Read,Edit,Write", "--disable-slash-commands"]  # 12 kB of prompt in place of 80
    command = ["claude", "-p", prompt, "--model", MODEL, "--dangerously-skip-permissions", *few_tools]
    return command, {
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # else the system prompt begins with a line that differs per task
        "IS_SANDBOX": "1",  # lets root skip the permissions
    }


def codex(prompt: str) -> tuple[list[str], dict[str, str]]:
    """``npm install @openai/codex``. The web search is run by OpenAI's servers, so it is switched off."""
    settings = {
        "model": MODEL,
        "model_provider": "gateway",
        "model_providers.gateway.name": "gateway",
        "model_providers.gateway.base_url": os.environ["OPENAI_BASE_URL"],
        "model_providers.gateway.env_key": "OPENAI_API_KEY",
        "model_providers.gateway.wire_api": "responses",
        "web_search": "disabled",
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={json.dumps(value)}")]
    flags = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    return ["codex", "exec", *flags, *options, prompt], {}


def opencode(prompt: str) -> tuple[list[str], dict[str, str]]:
    """``npm install opencode-ai``. Titles of its sessions would be trajectories of their own."""
    options = {"baseURL": os.environ["OPENAI_BASE_URL"], "apiKey": os.environ["OPENAI_API_KEY"]}
    provider = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {MODEL: {}}}
    settings = {
        "model": f"gateway/{MODEL}",
        "provider": {"gateway": provider},
        "agent": {"title": {"disable": True}},
        "permission": "allow",
        "autoupdate": False,
    }
    return ["opencode", "run", prompt], {"OPENCODE_CONFIG_CONTENT": json.dumps(settings)}


def qwen(prompt: str) -> tuple[list[str], dict[str, str]]:
    """``npm install @qwen-code/qwen-code``. It finds OPENAI_BASE_URL and OPENAI_API_KEY."""
    return ["qwen", "-p", prompt, "--yolo", "--auth-type", "openai"], {"OPENAI_MODEL": MODEL}


AGENTS = {"claude": claude, "codex": codex, "opencode": opencode, "qwen": qwen}


def main(name: str, task: dict) -> float:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work, home = Path(folder, "work"), Path(folder, "home")
        work.mkdir()
        home.mkdir()
        for file, text in task.get("files", {}).items():
            work.joinpath(file).parent.mkdir(parents=True, exist_ok=True)
            work.joinpath(file).write_text(text)
        command, variables = AGENTS[name](task["prompt"])
        environment = {**os.environ, **variables, "HOME": str(home), "PWD": str(work)}  # OpenCode trusts PWD
        subprocess.run(command, cwd=work, env=environment, stdin=subprocess.DEVNULL, check=True)
        return float(subprocess.run(task["check"], shell=True, cwd=work).returncode == 0)


if __name__ == "__main__":
    print(main(sys.argv[1], json.loads(sys.argv[2])))
