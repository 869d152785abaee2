"""The rule of this folder: no test starts a process. Also the fixtures that several of its files use."""

from __future__ import annotations

import itertools
import multiprocessing.process
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.fake_sglang import FakeServer, FakeSettings

STARTS_A_PROCESS: list[tuple[Any, str]] = [
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
    *((os, name) for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system")),
]


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("a test in tests/quick started a process: move it to tests/processes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Refuse new processes during setup, call and teardown. Threads and a ``FakeServer`` in this process are allowed.

    A hook, because a fixture would not cover fixtures of a wider scope.
    """
    with pytest.MonkeyPatch.context() as patch:
        in_this_folder = item.path.is_relative_to(Path(__file__).parent)  # this hook runs for every item of the run
        for owner, name in STARTS_A_PROCESS if in_this_folder else ():
            patch.setattr(owner, name, refuse)
        return (yield)  # type: ignore[return-value]  # pluggy wants the wrapped result


@pytest.fixture
def fake(tiny_llama: Path) -> Iterator[FakeServer]:
    """A fake server of today's version, in this process."""
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server:
        yield server


@pytest.fixture
def make(tiny_llama: Path) -> Iterator[Callable[..., FakeServer]]:
    """``make(**fields of FakeSettings)``: a fake server of the tiny model, until the test ends."""
    with ExitStack() as servers:
        yield lambda **settings: servers.enter_context(FakeServer(FakeSettings(model_path=tiny_llama, **settings)))


@pytest.fixture
def replace(tiny_llama: Path) -> Iterator[Callable[..., FakeServer]]:
    """``replace(server, **settings)``: ends a server and starts another one at its address, until the test ends."""
    with ExitStack() as servers:

        def replaced(server: FakeServer, **settings: Any) -> FakeServer:
            server.stop()
            given = FakeSettings(port=server.settings.port, **{"model_path": tiny_llama, **settings})
            deadline = time.monotonic() + 20
            while True:
                try:
                    return servers.enter_context(FakeServer(given))
                except OSError:  # the listener's thread still polls the old socket
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)

        yield replaced


@pytest.fixture
def numbered(tokenizer: Any) -> tuple[Any, Any]:
    """Sessions and their model, each answer of which is another number."""
    from tests.agent_kit import says, scripted  # needs the extra "agents"

    numbers = itertools.count(1)
    return scripted(tokenizer, lambda _: says(tokenizer, str(next(numbers)), "<|im_end|>"))
