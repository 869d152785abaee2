"""Events of a server's stream that the gateway had no time to read before the next one came."""

from __future__ import annotations

import pytest

from torchrl_sglang.agents.server_calls import event_data


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("ends", [True, False])
def test_of_events_that_came_together_the_last_is_read_and_the_end_is_seen(count: int, ends: bool) -> None:
    end = [b"data: [DONE]", b""] if ends else []
    lines = [part for number in range(count) for part in (b"data: %d" % number, b"")] + end
    ended = [b"[DONE]"] if ends else []
    assert event_data(lines, latest_only=True) == [b"%d" % (count - 1), *ended]
    assert event_data(lines, latest_only=False) == [*(b"%d" % number for number in range(count)), *ended]


def test_comments_and_empty_lines_are_no_events() -> None:
    assert event_data([b": ping", b"", b"event: x"], latest_only=True) == []
    assert event_data([b"data: [DONE]"], latest_only=True) == [b"[DONE]"]
