"""What a program of the Python tool can reach, what it leaves behind, and an interpreter that does not start."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.recipes import run_python

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "torchrl_sglang" / "recipes" / "tools" / "python_tool.py"


def can_make_namespaces() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    return subprocess.run([unshare, "-Urmpinf", "true"], capture_output=True, check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(not can_make_namespaces(), reason="this machine gives users no namespaces")

READ_ENVIRONMENTS = """
import glob
found = [open(name, "rb").read() for name in glob.glob("/proc/*/environ")]
print(sum(b"SECRET_OF_THE_TRAINER" in text for text in found), len(found))
"""
LEAVE_A_PROCESS = """
import os, time
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        os.write(write, b"x")
        time.sleep(600)
    os._exit(0)
os.read(read, 1)
"""


@needs_namespaces
def test_a_program_does_not_see_the_trainers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "1")
    assert run_python(READ_ENVIRONMENTS).output == "0 0"


@needs_namespaces
def test_a_program_neither_reads_nor_deletes_a_file_of_the_trainers(tmp_path: Path) -> None:
    file = tmp_path / "answers.txt"
    file.write_text("42")
    for attempt in (f"print(open({str(file)!r}).read())", f"import os; os.remove({str(file)!r})"):
        assert "FileNotFoundError" in run_python(attempt).output
    assert "Read-only file system" in run_python("import os; os.rename(os.__file__, os.__file__ + '2')").output
    assert "Read-only file system" in run_python("open('/new', 'w')").output
    assert file.read_text() == "42"
    assert run_python("print(open('/etc/passwd').read())").failed


@needs_namespaces
def test_a_program_reaches_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        connect = f"import socket; socket.create_connection({server.getsockname()!r}, timeout=1)"
        assert run_python(connect).failed
        with pytest.raises(TimeoutError):
            server.accept()
    held = socket.socket(socket.AF_UNIX)
    with held:
        held.bind("\0trainer")
        held.listen()
        assert run_python("import socket; socket.socket(socket.AF_UNIX).connect('\\0trainer')").failed


@needs_namespaces
def test_a_program_starts_no_process_and_gets_no_rights_back() -> None:
    if run_python("import os; print(os.getuid())").output != "0":  # the limit does not hold for the machine's root
        assert "BlockingIOError" in run_python("import os; os.fork()").output
    assert run_python("import os; print(os.getpid() < 5)").output == "True"
    program = """
    import ctypes, os
    c = ctypes.CDLL(None)
    print(c.unshare(0x10000000), c.unshare(0x20000), c.chroot(b"/tmp"), c.mount(b"x", b"/tmp", b"tmpfs", 0, None))
    """
    assert run_python(textwrap.dedent(program)).output == "-1 -1 -1 -1"


@needs_namespaces
def test_a_program_may_write_small_files_that_end_with_it() -> None:
    assert run_python("open('/tmp/a', 'w').write('x'); print(open('a').read())").output == "x"
    assert run_python("import os; print(os.listdir('/tmp'))").output == "[]"
    assert "File too large" in run_python("open('/tmp/a', 'w').write('x' * 2**25)").output


def test_the_standard_library_works() -> None:
    names = "ssl sqlite3 decimal json hashlib zoneinfo datetime statistics fractions itertools random re ctypes"
    program = f"import {names.replace(' ', ', ')}; print(round(statistics.mean([1, 2]), 1), random.random() < 1)"
    assert run_python(program, unsafe=True).output == "1.5 True"


def test_a_program_that_kills_itself_or_exits_is_its_own_failure() -> None:
    assert run_python("import os; os.kill(os.getpid(), 9)", unsafe=True).output == "the program was killed"
    words = "ImportError: libpython: cannot open shared object file"
    assert run_python(f"raise SystemExit({words!r})", unsafe=True).output == words
    assert run_python("import sys; sys.exit(0)", unsafe=True).failed is False


WITHOUT_NAMESPACES = """
import importlib.util, os, sys
from pathlib import Path
for kind in ("user", "mnt"):
    Path(f"/proc/sys/user/max_{kind}_namespaces").write_text("0")
from torchrl_sglang.errors import ConfigError
spec = importlib.util.spec_from_file_location("python_tool", sys.argv[2])  # without torch, whose import is slow
tool = sys.modules["python_tool"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
run_python = tool.run_python
try:
    run_python("print(1)")
except ConfigError as error:
    print("refused:", error)
print("unsafe:", run_python("print(6 * 7)", unsafe=True))
left = run_python(sys.argv[1], unsafe=True)
print("left:", left.output)
print("alive:", left.output.isdigit() and os.path.exists(f"/proc/{left.output}"))
endless = run_python(sys.argv[1] + "while True: pass", unsafe=True, timeout_s=2)
print("endless:", endless.output)
mine = os.getpid()
others = [p.name for p in Path("/proc").iterdir() if p.name.isdigit() and p.name != str(mine)]
stats = [Path("/proc", p, "stat").read_bytes() for p in others if Path("/proc", p).exists()]
print("children:", [s for s in stats if int(s.rpartition(b")")[2].split()[1]) == mine])
"""


@needs_namespaces
def test_root_without_namespaces_is_refused_unless_unsafe_and_then_nothing_is_left_behind() -> None:
    unshare = shutil.which("unshare")
    assert unshare is not None
    done = subprocess.run(
        [unshare, "-Ur", sys.executable, "-c", WITHOUT_NAMESPACES, LEAVE_A_PROCESS, str(TOOL)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=200,
        check=False,
    )
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said["refused"].startswith("the Python tool can't isolate programs on this machine ("), done.stderr
    assert "unsafe=True" in said["refused"]
    assert "unshare" in said["refused"]
    assert said["unsafe"] == "ProgramResult(output='42', failed=False)"
    # Root may start processes; any other user is stopped by the limit.
    assert said["left"].isdigit() if os.geteuid() == 0 else "BlockingIOError" in said["left"]
    assert said["alive"] == "False"
    assert said["endless"] == "TimeoutError: not done after 2 s" or os.geteuid() != 0
    assert said["children"] == "[]"


NEEDS_LIBRARIES = """#!/bin/sh
if [ "$LD_LIBRARY_PATH" != /opt/python/lib ]; then
    echo "python: error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file" >&2
    exit 127
fi
unset LD_LIBRARY_PATH
exec "{python}" "$@"
"""


def test_an_interpreter_that_needs_a_library_path_gets_it_and_its_failure_is_not_the_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(NEEDS_LIBRARIES.format(python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/python/lib")
    assert run_python("print(6 * 7)", unsafe=True).output == "42"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    with pytest.raises(ConfigError, match=r"did not start, so no program was run: .*libpython3\.11\.so\.1\.0"):
        run_python("print(6 * 7)", unsafe=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="can't be started"):
        run_python("print(6 * 7)", unsafe=True)
