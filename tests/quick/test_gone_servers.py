"""Whether a server is gone, asked after it dropped a connection."""

from __future__ import annotations

from typing import Any

import pytest

from torchrl_sglang.errors import RequestRejectedError, ServerLostError, ServerUnreachableError
from torchrl_sglang.pool.dispatch import is_gone

OK, LOST, CLOSED = None, ServerLostError("dropped"), ServerUnreachableError("closed")


class Client:
    """Answers with the outcomes in order, and with the last one for ever."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)

    def send(self, _: Any) -> Any:
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if outcome is not None:
            raise outcome


@pytest.mark.parametrize(
    ("outcomes", "gone"),
    [
        ([CLOSED], True),
        ([LOST, CLOSED], True),
        ([OK, CLOSED], True),  # it answered on a connection that was open
        ([OK, LOST, OK, CLOSED], True),
        ([OK], False),
        ([LOST, OK], False),
        ([RequestRejectedError("busy", status=503)], False),
    ],
)
def test_a_server_is_gone_when_nothing_listens_and_there_when_it_keeps_answering(outcomes: list, gone: bool) -> None:
    assert is_gone(Client(*outcomes)) is gone  # type: ignore[arg-type]
