"""Programs that a model wrote, run by the Python tool in a process with limits, isolated or not.

``unsafe=True``: these tests also run as root in containers without namespaces.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from torchrl_sglang.recipes import run_python


def test_a_program_that_does_not_end_is_killed() -> None:
    started = time.monotonic()
    result = run_python("import time\nwhile True: time.sleep(1)", timeout_s=1.0, unsafe=True)
    assert result.failed
    assert result.output == "TimeoutError: not done after 1 s"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("bytearray(2**40)", "MemoryError"),
        ("print(undefined)", "NameError: name 'undefined' is not defined"),
        ("print(1", "SyntaxError"),
        ("import sys; sys.stderr.write('so it goes\\n' * 100_000); 1 / 0", "ZeroDivisionError"),
        ("print('x\\n' * 1_000_000)", "x\nx"),
        ("import os; print(len(os.environ) < 3)", "True"),  # Python may set a locale
        ("import torch", "ModuleNotFoundError"),
        ("print('x' * 1000)", "x" * 200),
        ("input()", "EOFError"),
        ("pass", ""),
        ("print(6 * 7)", "42"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_program_has_limits_and_an_empty_environment(program: str, output: str) -> None:
    assert output in run_python(program, unsafe=True).output
    assert len(run_python(program, unsafe=True).output) <= 200


def test_a_program_writes_no_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert run_python(f"open({str(file)!r}, 'w').write('x' * 9999)", unsafe=True).failed
    assert not file.exists() or file.stat().st_size == 0
