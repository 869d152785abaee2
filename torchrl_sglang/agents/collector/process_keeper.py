"""The small process between the collector and an agent's program: starts it, and ends every process that it left.

``python -I -S process_keeper.py``. It reads one line of JSON from stdin, which may hold keys::

    {"owner_pid": 1234, "command": ["python", "agent.py", ...], "environment": {...}, "stdin": null}

The program has the keeper's stdout and stderr, and the given text, or nothing, as stdin. The keeper ends when the
program ends, when its stdin is closed, or when the collector's process is gone. Then it kills every process below
itself. As a "subreaper" it is the ancestor of all of them, also of those that made a session of their own. Its exit
code is the program's (128 + signal when killed); 127 with a line on stderr if the program can't be started.
"""

import ctypes
import errno
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

_PR_SET_CHILD_SUBREAPER = 36
_NOT_STARTED = 127
_OWNER_POLL_S = 0.5


def _supervisor() -> ModuleType:
    """The servers' supervisor, which lists and kills process trees; the package is not on this program's path."""
    path = Path(__file__).parents[2] / "server" / "supervisor.py"
    spec = importlib.util.spec_from_file_location("supervisor", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Run the program until it ends or is not wanted any more."""
    order = json.loads(_read_line())
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    supervisor = _supervisor()
    try:
        program = subprocess.Popen(order["command"], env=order["environment"], stdin=_stdin(order["stdin"]))
    except OSError as error:
        sys.stderr.write(f"{order['command'][0]}: {error.strerror or error}{_hint(order['command'][0], error)}\n")
        return _NOT_STARTED
    ended_read, ended_write = os.pipe()

    def tell_end() -> None:
        program.wait()
        os.close(ended_write)

    threading.Thread(target=tell_end, daemon=True).start()
    # The pid is asked for too: another process of the collector's may have inherited the pipe.
    while not select.select([0, ended_read], [], [], _OWNER_POLL_S)[0] and os.getppid() == order["owner_pid"]:
        pass
    supervisor.kill_tree(os.getpid())
    code = program.wait()
    return code if code >= 0 else 128 - code


def _stdin(text: "str | None") -> int:
    """A file with this text: a pipe would have to be written while the program reads."""
    if text is None:
        return subprocess.DEVNULL
    made = os.memfd_create("stdin")
    with open(made, "wb", closefd=False) as file:
        file.write(text.encode())
    os.lseek(made, 0, os.SEEK_SET)
    return made


def _hint(program: str, error: OSError) -> str:
    if error.errno == errno.ENOEXEC:
        return ": is it a script without a first line such as #!/bin/bash?"
    if error.errno == errno.ENOENT and Path(program).exists():
        return ": the file is there, its first line names a program that is not (or ends as on Windows)"
    return ""


def _read_line() -> bytes:
    """One line of stdin, and nothing behind it."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            break
        line += part
    return bytes(line)


if __name__ == "__main__":
    sys.exit(main())
