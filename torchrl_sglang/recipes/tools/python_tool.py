"""Python as a tool: find a program in an answer, run it with limits, return its output."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torchrl_sglang.errors import ConfigError

__all__ = ["PROGRAM", "ProgramResult", "find_program", "run_python"]

PROGRAM = r"```(?:python|py)\n(.*?)\n```"
"""Matches a closed Python code block."""

_RUNNER = Path(__file__).with_name("python_runner.py")
_MEMORY_BYTES = 512 * 2**20
_FILE_BYTES = 16 * 2**20
_MAX_OUTPUT_BYTES = 2**16
_START_S = 60.0  # until the interpreter runs, on a machine that is busy with other work: usually a tenth of a second
_REFUSED = "not isolated "  # how the runner's report begins when it could make no namespaces
_END_S = 2.0  # until the keeper has ended, once it has nothing more to do
_LOADER_NAMES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


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


def run_python(
    program: str, *, timeout_s: float = 5.0, max_characters: int = 200, unsafe: bool = False
) -> ProgramResult:
    """Run a program in a process of its own, with limits and, where Linux allows it, in namespaces of its own.

    In namespaces the program sees no network, no other process, and of the files only Python's own, read-only, and an
    empty ``/tmp`` of 16 MiB that ends with it. As root it runs as ``nobody``. Everywhere its environment is empty, but
    for ``LD_LIBRARY_PATH``; it has 512 MiB of memory, ``timeout_s`` seconds of CPU time and of wall-clock time, and no
    second process or thread; what it has started all the same is killed. Without namespaces it has the rights of the
    user who trains, apart from writing files: it can read that user's files and delete them, and read the environment
    of that user's processes.

    Args:
        program: the source text.
        timeout_s: the program is killed after this many seconds; also its limit of CPU time.
        max_characters: the output is truncated to this length.
        unsafe: run programs as root also where there are no namespaces.

    Raises:
        ConfigError: the interpreter can't be started, or this is root without namespaces.

    Examples:
        >>> run_python("print(6 * 7)")  # doctest: +SKIP
        ProgramResult(output='42', failed=False)
        >>> run_python("1 / 0").output  # doctest: +SKIP
        'ZeroDivisionError: division by zero'
    """
    refusal = _why_not_isolated()
    if refusal is not None and os.geteuid() == 0 and not unsafe:
        raise ConfigError(
            f"the Python tool can't isolate programs on this machine ({refusal}), and as root a program could read and "
            "delete everything. Nothing was run. Train as another user, let the container make namespaces (for Docker "
            "--cap-add SYS_ADMIN), or accept it with unsafe=True (tool.unsafe=true) where nothing can be harmed."
        )
    ran = _run(program, timeout_s, isolate=refusal is None)
    if ran.refusal is not None:
        raise ConfigError(f"the Python tool could not isolate a program: {ran.refusal}. It was not run.")
    if ran.timed_out:
        return ProgramResult(output=f"TimeoutError: not done after {timeout_s:g} s", failed=True)
    failed = ran.code != 0
    lines = (ran.stderr if failed else ran.stdout).strip().splitlines()
    output = (lines[-1] if lines else "the program was killed") if failed else "\n".join(lines)
    return ProgramResult(output=output[:max_characters], failed=failed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ran:
    """What the keeper reported, and what the program printed; ``refusal`` says why nothing was run."""

    stdout: str
    stderr: str
    code: int = 0
    timed_out: bool = False
    refusal: str | None = None


@functools.cache
def _why_not_isolated() -> str | None:
    """Why this machine gives a program no namespaces, tried once; ``None`` if it does."""
    refusal = _run("", _START_S, isolate=True).refusal
    if refusal is not None and os.geteuid() != 0:
        warnings.warn(f"programs of the Python tool have no namespaces of their own ({refusal})", stacklevel=3)
    return refusal


def _run(program: str, timeout_s: float, *, isolate: bool) -> _Ran:
    """Run a program under a keeper.

    Raises:
        ConfigError: the interpreter can't be started.
    """
    report, report_end = os.pipe()
    order = {
        "cpu_s": math.ceil(timeout_s),
        "memory_bytes": _MEMORY_BYTES,
        "file_bytes": _FILE_BYTES if isolate else 0,
        "timeout_s": timeout_s,
        "report": report_end,
        "isolate": isolate,
    }
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_RUNNER), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # What the loader needs to start this interpreter, and nothing else.
            env={name: os.environ[name] for name in _LOADER_NAMES if name in os.environ},
            cwd="/",
            start_new_session=True,
            pass_fds=(report_end,),
        )
    except OSError as error:
        os.close(report)
        raise ConfigError(f"the Python tool's interpreter {sys.executable!r} can't be started: {error}") from error
    finally:
        os.close(report_end)
    with os.fdopen(report, "rb") as pipe:
        try:
            stdout, stderr, events = _communicate(process, pipe, program, timeout_s + _START_S)
        except BaseException:
            process.send_signal(signal.SIGALRM)
            raise
        finally:
            _end(process)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
    return _read_report(events, stdout, stderr, process.returncode)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the keeper; one that still runs is told to end its program first, since only it finds all processes."""
    for number in (None, signal.SIGALRM, signal.SIGKILL):
        if number is not None:
            process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
            return
    process.wait()


def _read_report(events: str, stdout: str, stderr: str, keeper_code: int) -> _Ran:
    lines = events.splitlines()
    refusals = [line.removeprefix(_REFUSED) for line in lines if line.startswith(_REFUSED)]
    if refusals:
        return _Ran(stdout=stdout, stderr=stderr, refusal=refusals[0])
    if "started" not in lines:
        told = stderr.strip() or stdout.strip() or f"it ended with exit code {keeper_code} and printed nothing"
        raise ConfigError(
            f"the Python tool's interpreter {sys.executable!r} did not start, so no program was run: {told[-500:]}. "
            "Start the trainer with an interpreter that runs by itself, or set LD_LIBRARY_PATH before it starts."
        )
    last, _, detail = lines[-1].partition(" ")
    code = int(detail) if last == "ended" else -signal.SIGKILL
    return _Ran(stdout=stdout, stderr=stderr, code=code, timed_out=last == "timeout")


def _communicate(
    process: subprocess.Popen[bytes], report: BinaryIO, program: str, timeout_s: float
) -> tuple[str, str, str]:
    """Return the beginning of the program's stdout, the end of its stderr, and the keeper's report.

    ``Popen.communicate`` keeps all output, so a program that prints without end would fill the trainer's memory. At the
    deadline, which only a keeper that was killed or is starved misses, what has come is returned.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + timeout_s
    kept: dict[Any, bytes] = {process.stdout: b"", process.stderr: b"", report: b""}
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(program.encode(errors="replace"))
        process.stdin.close()
    with selectors.DefaultSelector() as open_pipes:
        for pipe in kept:
            open_pipes.register(pipe, selectors.EVENT_READ, pipe)
        while open_pipes.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in open_pipes.select(left):
                chunk = os.read(key.fd, _MAX_OUTPUT_BYTES)
                if not chunk:
                    open_pipes.unregister(key.fileobj)
                output = kept[key.data] + chunk
                kept[key.data] = (
                    output[:_MAX_OUTPUT_BYTES] if key.data is process.stdout else output[-_MAX_OUTPUT_BYTES:]
                )
    stdout, stderr, events = (text.decode(errors="replace") for text in kept.values())
    return stdout, stderr, events
