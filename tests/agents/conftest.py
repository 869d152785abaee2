"""Agent frameworks as their users have them: unmodified, pinned, each in an environment of its own.

``clients/NAME.py`` is a program that runs a two-turn tool conversation with one framework, given a session's address
and key. ``requirements/NAME.txt`` has its pins. Nothing of this project is installed in these environments.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torchrl_sglang.agents.gateway import AgentGateway
from torchrl_sglang.server import SGLangServer

collect_ignore_glob = ["clients/*"]  # programs for other environments
HERE = Path(__file__).parent
INSTALL_TIMEOUT_S = 900
CLIENT_TIMEOUT_S = 200


@pytest.fixture(scope="session")
def tiny_with_room(make_model: Callable[..., Path]) -> Path:
    """A tiny model with a context that holds the frameworks' system prompts, a token per letter or two."""
    return make_model(arch="llama", seed=0, context_length=32768)


@pytest.fixture(scope="session")
def grammar_server(special_server: Callable[..., SGLangServer], tiny_with_room: Path) -> SGLangServer:
    """A real server that can be made to call a tool: a random model would never do so."""
    flags = ("--grammar-backend", "xgrammar", "--max-total-tokens", "40000")
    return special_server(model=str(tiny_with_room), extra_args=flags)


@pytest.fixture(scope="session")
def gateway(grammar_server: SGLangServer) -> Iterator[AgentGateway]:
    with AgentGateway(grammar_server.url) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def run_client(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``run_client(name, base_url, api_key)``: installs a framework, runs its program, returns what it printed."""
    folder = tmp_path_factory.mktemp("frameworks")

    def run(name: str, base_url: str, api_key: str) -> str:
        is_javascript = (HERE / "clients" / f"{name}.mjs").exists()
        command = javascript(folder, name) if is_javascript else python(folder, name)
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "OPENAI"))}
        done = subprocess.run(
            [*command, base_url, api_key],
            env={**variables, "HOME": str(folder), "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=CLIENT_TIMEOUT_S,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


def python(folder: Path, name: str) -> list[str]:
    """The command that runs a Python client in its environment."""
    environment = folder / name
    if not environment.exists():
        install([sys.executable, "-m", "venv", str(environment)])
        pins = HERE / "requirements" / f"{name}.txt"
        pip = [str(environment / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        install([*pip, "install", "--quiet", "--no-compile", "--requirement", str(pins)])
    return [str(environment / "bin" / "python"), str(HERE / "clients" / f"{name}.py")]


def javascript(folder: Path, name: str) -> list[str]:
    """The command that runs a JavaScript client beside its packages."""
    if shutil.which("npm") is None:
        complain("npm is not installed")
    environment = folder / name
    if not environment.exists():
        environment.mkdir()
        shutil.copy(HERE / "requirements" / f"{name}.json", environment / "package.json")
        shutil.copy(HERE / "clients" / f"{name}.mjs", environment)
        install(["npm", "install", "--prefix", str(environment), "--no-audit", "--no-fund", "--silent"])
    return ["node", str(environment / f"{name}.mjs")]


def install(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    if done.returncode != 0:
        complain(f"the framework can't be installed: {done.stderr[-1000:]}")


def complain(message: str) -> None:
    pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
