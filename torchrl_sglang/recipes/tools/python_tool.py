"""Python as a tool: find a program in an answer, run it with limits, return its output."""

from __future__ import annotations

import contextlib
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PROGRAM", "ProgramResult", "find_program", "run_python"]

PROGRAM = r"```(?:python|py)\n(.*?)\n```"
"""Matches a closed Python code block."""

_RUNNER = Path(__file__).with_name("python_runner.py")
_MEMORY_BYTES = 512 * 2**20
_MAX_OUTPUT_BYTES = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramResult:
    """Result of a program.

    Attributes:
        output: the printed text; the last line of the error if the program failed.
        failed: whether the program ended with an error or was killed.
    """

    output: str
    failed: bool


def find_program(answer: str, pattern: str = PROGRAM) -> str | None:
    r"""Find the first program in an answer.

    Args:
        answer: the model's answer.
        pattern: a regular expression whose first group is the program; the dot matches line ends too.

    Examples:
        >>> find_program("Sure:\n```python\nprint(1 + 2)\n```\n")
        'print(1 + 2)'
        >>> find_program("3") is None
        True
    """
    found = re.search(pattern, answer, re.DOTALL)
    return found[1] if found else None


def run_python(program: str, *, timeout_s: float = 5.0, max_characters: int = 200) -> ProgramResult:
    """Run a program in a separate process with an empty environment and limits on time, memory and files.

    This contains mistakes. It is not a sandbox: the program has the permissions of the user who trains. Train models
    that may write harmful programs in a container without network and secrets.

    Args:
        program: the source text.
        timeout_s: the program is killed after this many seconds; also its limit of CPU time.
        max_characters: the output is truncated to this length.

    Examples:
        >>> run_python("print(6 * 7)")
        ProgramResult(output='42', failed=False)
        >>> run_python("1 / 0").output
        'ZeroDivisionError: division by zero'
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_RUNNER), str(math.ceil(timeout_s)), str(_MEMORY_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
    )
    try:
        stdout, stderr = _communicate(process, program, timeout_s)
    except subprocess.TimeoutExpired:
        return ProgramResult(output=f"TimeoutError: not done after {timeout_s:g} s", failed=True)
    finally:
        with contextlib.suppress(ProcessLookupError):  # kill its children too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    failed = process.returncode != 0
    lines = (stderr if failed else stdout).strip().splitlines()
    output = (lines[-1] if lines else "the program was killed") if failed else "\n".join(lines)
    return ProgramResult(output=output[:max_characters], failed=failed)


def _communicate(process: subprocess.Popen[bytes], program: str, timeout_s: float) -> tuple[str, str]:
    """Return the beginning of the program's stdout and the end of its stderr.

    ``Popen.communicate`` keeps all output, so a program that prints without end would fill the trainer's memory.

    Raises:
        subprocess.TimeoutExpired: the program is still running.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + timeout_s
    kept = {process.stdout: b"", process.stderr: b""}
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(program.encode())
        process.stdin.close()
    with selectors.DefaultSelector() as open_pipes:
        for pipe in kept:
            open_pipes.register(pipe, selectors.EVENT_READ, pipe)
        while open_pipes.get_map():
            ready = open_pipes.select(max(0.0, deadline - time.monotonic()))
            if not ready or time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(process.args, timeout_s)
            for key, _ in ready:
                chunk = os.read(key.fd, _MAX_OUTPUT_BYTES)
                if not chunk:
                    open_pipes.unregister(key.fileobj)
                output = kept[key.data] + chunk
                kept[key.data] = (
                    output[:_MAX_OUTPUT_BYTES] if key.data is process.stdout else output[-_MAX_OUTPUT_BYTES:]
                )
    process.wait(max(0.1, deadline - time.monotonic()))
    return kept[process.stdout].decode(errors="replace"), kept[process.stderr].decode(errors="replace")
