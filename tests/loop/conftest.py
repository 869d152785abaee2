"""What several files of ``tests/loop`` share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.loop.forked import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Fake servers and trainers as processes, in 50 ms each."""
    with Nursery(tmp_path_factory.mktemp("forked")) as started:
        yield started
