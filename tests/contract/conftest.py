"""The servers under test: a fake one per test, and the real one that the run shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.kit import Subject
from tests.fake_sglang import FakeServer, FakeServerProcess, FakeSettings


@pytest.fixture(params=["fake", "real"])
def subject(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[Subject]:
    """A server in its initial state. Changes to the real one are undone after the test."""
    if request.param == "fake":
        with FakeServer(FakeSettings(model_path=tiny_llama)) as fake:
            yield Subject(fake.url, "fake", tiny_llama)
    else:
        yield Subject(request.getfixturevalue("pristine_server").url, "real", tiny_llama)


@pytest.fixture(params=["fake", "real"])
def start_subject(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[Callable[..., Subject]]:
    """``start_subject(api_key=..., admin_api_key=...)``: a server for one test, which may end it."""
    fakes: list[FakeServerProcess] = []

    def start(**settings: Any) -> Subject:
        if request.param == "real":
            return Subject(request.getfixturevalue("launch_server")(**settings).url, "real", tiny_llama)
        fakes.append(FakeServerProcess(FakeSettings(model_path=tiny_llama, **settings)).start())
        return Subject(fakes[-1].url, "fake", tiny_llama)

    yield start
    for fake in fakes:
        fake.kill()
