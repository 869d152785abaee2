"""Agents that are programs: a command line per run, without a shell, and no process left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torchrl_sglang.agents.collector import process_keeper
from torchrl_sglang.agents.collector.failures import RunFailedError
from torchrl_sglang.agents.collector.rewards import NoReward, Reward, last_line, read_last_line
from torchrl_sglang.agents.collector.task_texts import task_as_json
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server.environment import reach_directly
from torchrl_sglang.server.supervisor import kill_tree

__all__ = ["CommandAgent"]

_FIELD = re.compile(r"\{(base_url|api_key|task)\}")
_MOST_OUTPUT_BYTES = 1 << 20
_SHOWN_ERRORS = 2000
_SHOWN_LINE = 200
_END_S = 10.0
"""Until a keeper has killed its processes: milliseconds, unless the machine swaps."""
_PIPES_S = 1.0
"""Until the pipes of a keeper that has ended are closed, unless a process that it could not kill holds them."""
_LONGEST_ARGUMENT = 128 * 1024 - 1
"""Linux's limit for one argument, in bytes."""


class CommandAgent:
    """Runs a command line once per call.

    ``{base_url}``, ``{api_key}`` and ``{task}`` are replaced in every argument; a task that is no string is written as
    JSON. Without ``{task}`` the program reads the task from its stdin, which is empty otherwise. No shell takes part:
    what a task contains is never interpreted. The program also finds the first two in ``OPENAI_BASE_URL`` and
    ``OPENAI_API_KEY``, where OpenAI's clients look for them, in ``ANTHROPIC_BASE_URL``, ``ANTHROPIC_API_KEY`` and
    ``ANTHROPIC_AUTH_TOKEN``, where Anthropic's do, and the rest of this process's
    environment. When it ends, and when the run is cancelled, all processes that it started are killed.

    Args:
        command: a command line, split as a shell would, or a list of arguments.

    Raises:
        ConfigError: there is no such program.
    """

    def __init__(self, command: str | Sequence[str | os.PathLike[str]]) -> None:
        try:
            words = shlex.split(command) if isinstance(command, str) else list(map(_as_argument, command))
        except ValueError as error:
            raise ConfigError(f"run_agent={command!r:.200} can't be split into arguments: {error}") from error
        if not words or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"run_agent must be a function or a command line, got {command!r:.200}")
        operators = [word for word in words if isinstance(command, str) and word in _SHELL_OPERATORS]
        if operators:
            raise ConfigError(
                f"run_agent has {operators[0]!r}, and is started without a shell: for a shell's features use "
                "bash -c '...' with \"$OPENAI_BASE_URL\""
            )
        if not _FIELD.search(words[0]) and shutil.which(words[0]) is None:
            raise ConfigError(
                f"run_agent: there is no program {words[0]!r}. It is started without a shell: for a "
                "shell's features use bash -c '...' with \"$OPENAI_BASE_URL\""
            )
        unknown = [name for word in words for name in re.findall(r"(?<!\$)\{(\w+)\}", word) if name in _LIKELY_MISTAKES]
        if unknown:
            raise ConfigError(
                f"run_agent has {{{unknown[0]}}}: what is replaced are {{base_url}}, {{api_key}} and {{task}}"
            )
        self.words = tuple(words)
        self._takes_task = any("{task}" in word for word in words)

    def __str__(self) -> str:
        return shlex.join(self.words)

    def arguments(self, task: Any, base_url: str, api_key: str) -> list[str]:
        """The arguments of one run.

        Raises:
            RunFailedError: a task that no argument can hold.

        Examples:
            >>> CommandAgent("python agent.py {task} --url={base_url}").arguments({"a": 1}, "http://host/v1", "key")
            ['python', 'agent.py', '{"a": 1}', '--url=http://host/v1']
        """
        values = {"base_url": base_url, "api_key": api_key, "task": _as_text(task) if self._takes_task else ""}
        # In one pass: a task that contains {api_key} stays as it is.
        arguments = [_FIELD.sub(lambda field: values[field[1]], word) for word in self.words]
        for argument in arguments:
            if "\0" in argument:
                raise RunFailedError(
                    "error",
                    "the task contains a NUL character, which an argument can't hold: leave out {task}, and read the "
                    "task from stdin",
                )
            if len(argument.encode(errors="surrogatepass")) > _LONGEST_ARGUMENT:
                raise RunFailedError(
                    "error",
                    f"an argument of {len(argument)} characters with the task is longer than the system's 128 KiB: "
                    "leave out {task}, and read the task from stdin",
                )
        return arguments

    async def __call__(self, task: Any, base_url: str, api_key: str) -> Reward | NoReward:
        """Run the program once.

        Returns:
            The reward in the last line of its output, or that there is none.

        Raises:
            RunFailedError: it can't be started, or exits with an error.
        """
        order = {
            "owner_pid": os.getpid(),
            "command": self.arguments(task, base_url, api_key),
            "environment": agent_environment(os.environ, base_url, api_key),
            "stdin": None if self._takes_task else _as_text(task),
        }
        keeper = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(Path(process_keeper.__file__))),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the trainer's terminal is the trainer's to handle
        )
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        try:
            keeper.stdin.write(json.dumps(order).encode() + b"\n")
            output, errors = await asyncio.gather(_last(keeper.stdout), _last(keeper.stderr))
            code = await keeper.wait()
        finally:
            await _end(keeper)
            # Until its pipes are closed, asyncio holds them open, and complains about them once the loop is closed.
            closing = [asyncio.ensure_future(_last(stream)) for stream in (keeper.stdout, keeper.stderr)]
            await asyncio.wait(closing, timeout=_PIPES_S)
            for each in closing:
                each.cancel()
        if code != 0:
            shown = errors.decode(errors="replace").strip().replace(api_key, "***")[-_SHOWN_ERRORS:]
            raise RunFailedError("error", f"the program {_ending(code)}: {shown or 'it wrote no error'}")
        printed = output.decode(errors="replace")
        shown = last_line(printed).replace(api_key, "***")[-_SHOWN_LINE:]
        return read_last_line(printed) or NoReward(
            hint=f"; the last line that it printed is {shown!r}" if shown else "; it printed nothing"
        )


_LIKELY_MISTAKES = {"url", "baseurl", "key", "apikey", "prompt", "question", "token", "tasks"}
_SHELL_OPERATORS = {"|", "||", "&", "&&", ";", "<", ">", ">>", "2>", "2>&1", "<<<"}


def _as_argument(word: Any) -> Any:
    return os.fspath(word) if isinstance(word, os.PathLike) else word


def _ending(code: int) -> str:
    """How a program ended, by its exit code in a shell's form."""
    try:
        return f"was ended by signal {signal.Signals(code - 128).name}" if code > 128 else f"exited with code {code}"
    except ValueError:  # a code of the program's own
        return f"exited with code {code}"


def _as_text(task: Any) -> str:
    try:
        text = task_as_json(task)
        text.encode()
    except UnicodeEncodeError as error:
        raise RunFailedError("error", f"the task has half of a surrogate pair, which is no text: {error}") from error
    except (TypeError, ValueError) as error:
        raise RunFailedError(
            "error", f"the task can't be written as JSON for the program: {error}. Give tasks as text, or plain values"
        ) from error
    return text


async def _last(stream: asyncio.StreamReader) -> bytes:
    """The end of what a stream had, read until it is closed."""
    kept = b""
    while chunk := await stream.read(1 << 16):
        kept = (kept + chunk)[-_MOST_OUTPUT_BYTES:]
    return kept


async def _end(keeper: asyncio.subprocess.Process) -> None:
    """Let the keeper kill its processes; kill them from here if it doesn't."""
    if keeper.returncode is not None:
        return
    assert keeper.stdin is not None
    keeper.stdin.close()
    waiting = asyncio.ensure_future(keeper.wait())
    try:
        await asyncio.wait({asyncio.shield(waiting)}, timeout=_END_S)
    finally:
        if not waiting.done():
            kill_tree(keeper.pid)
            with contextlib.suppress(ProcessLookupError):
                keeper.kill()


def agent_environment(variables: Mapping[str, str], base_url: str, api_key: str) -> dict[str, str]:
    """The environment of an agent's program: this process's, with the gateway, which no proxy stands before.

    Examples:
        >>> agent_environment({"HTTP_PROXY": "http://proxy:3128"}, "http://10.0.0.7:8000/v1", "key")["NO_PROXY"]
        'localhost,127.0.0.1,127.0.0.0/8,::1,0.0.0.0,10.0.0.7'
        >>> agent_environment({"ANTHROPIC_AUTH_TOKEN": "mine"}, "http://h/v1", "key")["ANTHROPIC_AUTH_TOKEN"]
        'key'
    """
    made = {
        **variables,
        **dict.fromkeys(("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"), base_url),
        **dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"), api_key),
    }
    return reach_directly(made, [urlsplit(base_url).hostname or ""])
