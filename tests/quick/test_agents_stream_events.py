"""Events of a server's stream that the gateway had no time to read before the next one came."""

from __future__ import annotations

import json
from typing import Any

import pytest

from torchrl_sglang.agents.server_events import event_data
from torchrl_sglang.protocol.stream_events import StreamedReply


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


@pytest.mark.parametrize("num_read", [0, 1, 3])
@pytest.mark.parametrize("ends", [True, False])
def test_an_abort_that_has_the_last_token_only_ends_a_stream_whose_events_were_overtaken(
    num_read: int, ends: bool
) -> None:
    def event(ids: list[int], count: int, finish: dict[str, Any] | None = None) -> bytes:
        meta = {"completion_tokens": count, "finish_reason": finish}
        return b"data: " + json.dumps({"text": "", "output_ids": ids, "meta_info": meta}).encode()

    events = [event([5, 6, 7, 8][:count], count) for count in range(1, 5)]
    abort = event([8], 4, {"type": "abort", "message": "Abort in waiting queue"})
    reply = StreamedReply("http://host")
    together = [*events[num_read:], abort, *([b"data: [DONE]"] if ends else [])]
    for lines in (events[:num_read], together):
        for data in event_data(lines, latest_only=True):
            if data != b"[DONE]":
                whole = reply.add(json.loads(data))
    assert (whole["output_ids"], reply.is_finished) == ([5, 6, 7, 8], True)
