"""A Python in which SGLang is the fake server: launched, watched and killed like the real one, ready in seconds."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["make_python"]

ROOT = Path(__file__).resolve().parents[2]
# The supervisor runs in the real Python; `-m sglang.launch_server ...` becomes the fake server with the flags it knows.
PROGRAM = """#!{python}
import os, sys
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [{root!r}, os.environ.get("PYTHONPATH")]))
python = "{python}"
if sys.argv[1] == "-I":
    os.execv(python, [python, *sys.argv[1:]])
known = ("--model-path", "--host", "--port", "--weight-version")
words = sys.argv[3:]
passed = [word for flag, value in zip(words, words[1:]) if flag in known for word in (flag, value)]
command = [python, "-m", "tests.fake_sglang", *passed, *{more!r}]
print("server_args=", words, flush=True)
os.execv(python, command)
"""


def make_python(folder: Path, *more: str) -> str:
    """Path of the program, for ``ServerConfig(python=...)``; ``more`` are flags of the fake server."""
    path = folder / "python"
    path.write_text(PROGRAM.format(python=sys.executable, root=str(ROOT), more=more))
    path.chmod(0o755)
    return str(path)
