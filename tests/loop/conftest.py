"""Fixtures that several files of ``tests/loop`` use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.loop.forked_processes import ProcessFactory
from torchrl_sglang.server import SGLangServer


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessFactory]:
    """Starts fake servers and trainers as processes, in 50 ms each."""
    with ProcessFactory(tmp_path_factory.mktemp("forked")) as started:
        yield started


@pytest.fixture
def url(pristine_server: SGLangServer) -> str:
    """The address of the shared server, for a test that changes its weights."""
    return pristine_server.url
