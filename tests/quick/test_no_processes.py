"""A test in this folder cannot start a process; see conftest.py."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([sys.executable, "-c", ""], check=True),
        lambda: os.fork() or os._exit(0),
        lambda: multiprocessing.get_context("fork").Process(target=print).start(),
        lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
    ],
    ids=["subprocess", "fork", "multiprocessing fork", "multiprocessing spawn"],
)
def test_starting_a_process_fails(start: Callable[[], object]) -> None:
    with pytest.raises(AssertionError, match="move it to tests/processes"):
        start()
