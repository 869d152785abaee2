"""Runs one program for :func:`~torchrl_sglang.recipes.tools.python_tool.run_python`, and ends all its processes.

``python -I -S python_runner.py '{"cpu_s": 5, ...}'``, with the program on stdin and a pipe for the report. It imports
only the standard library, so a program starts in milliseconds and can't import the trainer's code. Three processes::

    keeper      waits for the program until its time is over, kills what is left, and reports
      init      in namespaces only: process 1 there; when it ends, the kernel kills all others
        program has the limits, and neither the report's pipe nor more rights than it needs

The report is a line per event: ``started``, ``ended CODE`` (minus the signal's number if it was killed), ``timeout``,
``not isolated REASON`` (nothing was run). Without ``started`` the interpreter itself failed.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType, ModuleType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38


def _namespaces() -> ModuleType:
    """The module beside this file; its folder is not on the path, so that programs can't import from it."""
    path = Path(__file__).with_name("python_namespaces.py")
    spec = importlib.util.spec_from_file_location("python_namespaces", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _report(pipe: int, line: str) -> None:
    os.write(pipe, f"{line}\n".encode())


def main() -> None:
    """Act as the keeper; returns only in the program's process."""
    order = json.loads(sys.argv[1])
    pipe: int = order["report"]
    code = sys.stdin.buffer.read()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the trainer's thread waits for this process
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    isolate = _namespaces() if order["isolate"] else None
    try:
        become_nobody = isolate is not None and isolate.enter()
        signal.signal(signal.SIGALRM, _too_late)  # the trainer sends it too, when it is interrupted
        child = os.fork()
        if child:
            _keep(child, order["timeout_s"], pipe)
        if isolate is not None:
            isolate.enclose()
            program = os.fork()
            if program:
                _be_init(program)
            isolate.drop_rights(become_nobody)
    except OSError as error:
        _report(pipe, f"not isolated {error}")
        os._exit(0)
    _run(code, order, pipe)


def _too_late(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError


def _keep(child: int, timeout_s: float, pipe: int) -> None:
    """Wait for the child until the time is over, end everything below this process, report, and exit."""
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        _, status = os.waitpid(child, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        code = os.waitstatus_to_exitcode(status)
        # Process 1 reports its child's signal by an exit code of its own.
        line = f"ended {code if code <= 128 else 128 - code}"
    except TimeoutError:
        line = "timeout"
    _kill_children()
    with contextlib.suppress(BrokenPipeError):
        _report(pipe, line)
    os._exit(0)


def _kill_children() -> None:
    """Kill and reap every child; as a subreaper this process is the parent of all orphans below it."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] != 0:
                continue
        except ChildProcessError:
            return
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _children() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The name is in parentheses and may itself hold spaces and parentheses.
                parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[1]
                if int(parent) == os.getpid():
                    found.append(int(entry.name))
    return found


def _be_init(program: int) -> None:
    """Wait for the program as process 1 of its namespace; the kernel kills all others with it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    while True:
        pid, status = os.wait()
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _run(code: bytes, order: dict[str, int], pipe: int) -> None:
    """Set the limits and run the program in this process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    for limit, value in (
        (resource.RLIMIT_CPU, order["cpu_s"]),
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),  # root is exempt, but in namespaces the program is not root
    ):
        resource.setrlimit(limit, (value, value))
    sys.argv = ["program"]
    _report(pipe, "started")
    os.closerange(3, 65536)
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
