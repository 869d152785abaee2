"""A stand-in for ``python`` that starts the fake server where SGLang would start; ready in seconds."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["make_python"]

ROOT = Path(__file__).resolve().parents[2]
# The supervisor (-I) runs in the real Python; `-m sglang.launch_server ...` starts the fake server.
PROGRAM = """#!{python}
import os, sys
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [{root!r}, os.environ.get("PYTHONPATH")]))
python = "{python}"
if sys.argv[1] == "-I":
    os.execv(python, [python, *sys.argv[1:]])
known = ("--model-path", "--host", "--port", "--weight-version", "--config")
words = sys.argv[3:]
passed = [word for flag, value in zip(words, words[1:]) if flag in known for word in (flag, value)]
command = [python, "-m", "tests.fake_sglang", *passed, *{more!r}]
print("server_args=", words, flush=True)
os.execv(python, command)
"""


def make_python(folder: Path, *more: str) -> str:
    """Write the program into ``folder`` and return its path, for ``ServerConfig(python=...)``.

    ``more`` are additional flags of the fake server.
    """
    path = folder / "python"
    path.write_text(PROGRAM.format(python=sys.executable, root=str(ROOT), more=more))
    path.chmod(0o755)
    return str(path)
