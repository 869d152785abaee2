"""Python as a tool: a model's program in, what it printed out."""

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
"""A Python code block that is also closed."""

_RUNNER = Path(__file__).with_name("python_runner.py")
_MEMORY_BYTES = 512 * 2**20
_MOST_OUTPUT_BYTES = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramResult:
    """What became of a program.

    Attributes:
        output: what it printed; the error's last line when it failed.
        failed: whether it ended with an error, or had to be ended.
    """

    output: str
    failed: bool


def find_program(answer: str, pattern: str = PROGRAM) -> str | None:
    r"""The first program in an answer.

    Args:
        answer: what the model said.
        pattern: a regular expression whose first group is the program; the dot stands for line ends too.

    Examples:
        >>> find_program("Sure:\n```python\nprint(1 + 2)\n```\n")
        'print(1 + 2)'
        >>> find_program("3") is None
        True
    """
    found = re.search(pattern, answer, re.DOTALL)
    return found[1] if found else None


def run_python(program: str, *, timeout_s: float = 5.0, max_characters: int = 200) -> ProgramResult:
    """Run a program in a process of its own, with limits on time, memory and files, and an empty environment.

    That keeps mistakes harmless. It is no sandbox: the program has the rights of the user who trains. Train models that
    may do mischief in a container without network and secrets.

    Args:
        program: its source text.
        timeout_s: the program is ended after so many seconds; also its limit of CPU time.
        max_characters: what it prints beyond these is cut off.

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
        printed, complaint = _communicate(process, program, timeout_s)
    except subprocess.TimeoutExpired:
        return ProgramResult(output=f"TimeoutError: not done after {timeout_s:g} s", failed=True)
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing that it started stays
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    failed = process.returncode != 0
    lines = (complaint if failed else printed).strip().splitlines()
    output = (lines[-1] if lines else "the program was ended") if failed else "\n".join(lines)
    return ProgramResult(output=output[:max_characters], failed=failed)


def _communicate(process: subprocess.Popen[bytes], program: str, timeout_s: float) -> tuple[str, str]:
    """The beginning of what the program prints, and the end of what it complains of.

    ``Popen.communicate`` would hold all of it, and a program that prints for ever fill the trainer's memory.

    Raises:
        subprocess.TimeoutExpired: it is not done.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + timeout_s
    held = {process.stdout: b"", process.stderr: b""}
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(program.encode())
        process.stdin.close()
    with selectors.DefaultSelector() as open_pipes:
        for pipe in held:
            open_pipes.register(pipe, selectors.EVENT_READ, pipe)
        while open_pipes.get_map():
            ready = open_pipes.select(max(0.0, deadline - time.monotonic()))
            if not ready or time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(process.args, timeout_s)
            for key, _ in ready:
                chunk = os.read(key.fd, _MOST_OUTPUT_BYTES)
                if not chunk:
                    open_pipes.unregister(key.fileobj)
                told = held[key.data] + chunk
                held[key.data] = told[:_MOST_OUTPUT_BYTES] if key.data is process.stdout else told[-_MOST_OUTPUT_BYTES:]
    process.wait(max(0.1, deadline - time.monotonic()))
    return held[process.stdout].decode(errors="replace"), held[process.stderr].decode(errors="replace")
