"""Streams are read alike, whether a server's events are cumulative or hold only what is new."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import ProtocolError, RequestRejectedError, SamplingParams, SGLangChat, WeightSyncError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_set_version
from torchrl_sglang.protocol.stream_events import StreamedReply

GREEDY = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9]]
KINDS = [
    {},
    {"stream_interval": 5},
    {"incremental_streaming_output": True},
    {"incremental_streaming_output": True, "stream_interval": 5},
]


@pytest.fixture
def make(tiny_llama: Path) -> Iterator[Callable[..., SGLangPool]]:
    made: list[FakeServer] = []

    def start(**settings: Any) -> SGLangPool:
        made.append(FakeServer(FakeSettings(model_path=tiny_llama, step_s=0.0, **settings)).__enter__())
        return SGLangPool([SGLangClient(made[-1].url)])

    yield start
    for server in made:
        server.__exit__(None, None, None)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_form_of_streaming_gives_what_a_whole_reply_has(make: Callable[..., SGLangPool], kind: dict) -> None:
    pool = make(**kind)
    whole = pool.generate(PROMPTS, GREEDY, prompt_logprobs=True)
    advances: list[int] = []
    shown = pool.generate(PROMPTS, GREEDY, prompt_logprobs=True, progress=advances.append)
    for expected, reply in zip(whole, shown, strict=True):
        assert len(reply.output_ids) == 12
        assert reply.output_ids == expected.output_ids
        assert reply.output_logprobs == expected.output_logprobs
        assert reply.prompt_logprobs == expected.prompt_logprobs
        assert reply.weight_spans == expected.weight_spans
    assert sum(advances) == 24
    grown = list(pool.stream(PROMPTS[0], GREEDY))
    assert grown[-1].output_ids == whole[0].output_ids
    assert grown[-1].output_logprobs == whole[0].output_logprobs
    assert all(later.output_ids[: len(r.output_ids)] == r.output_ids for r, later in itertools.pairwise(grown))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_pieces_of_a_streamed_chat_are_the_whole_text(make: Callable[..., SGLangPool], kind: dict) -> None:
    chat = SGLangChat(make(**kind), max_new_tokens=12, temperature=0)
    pieces = list(chat.iter_chat("What is 2 + 2?", on_finish=(finished := []).append))
    assert "".join(pieces) == finished[0].text == chat.chat("What is 2 + 2?")[0].text
    assert len(finished[0].token_ids) > 1


def test_a_streamed_chat_from_half_updated_weights_is_refused_as_a_whole_one_is(
    make: Callable[..., SGLangPool],
) -> None:
    chat = SGLangChat(make(), max_new_tokens=12, temperature=0)
    chat.pool.clients[0].send(build_set_version("dirty-1@a"))  # an update has begun since
    for answer in (chat.chat, lambda question: list(chat.iter_chat(question))):
        with pytest.raises(WeightSyncError, match="half-updated"):
            answer("What is 2 + 2?")


def event(ids: list[int], count: int, *, finish: Any = None, **meta: Any) -> dict[str, Any]:
    return {"text": "", "output_ids": ids, "meta_info": {"completion_tokens": count, "finish_reason": finish, **meta}}


def test_an_event_after_a_lost_one_is_refused() -> None:
    reply = StreamedReply("http://host")
    reply.add(event([5], 1))
    with pytest.raises(ProtocolError, match="1 tokens after 1, but counts 3: part of the stream is lost"):
        reply.add(event([7], 3))


def test_the_last_event_of_an_incremental_stream_may_hold_no_token() -> None:
    reply = StreamedReply("http://host")
    reply.add(event([5, 6], 2))
    assert not reply.is_finished
    whole = reply.add(event([], 2, finish={"type": "abort"}))
    assert (whole["output_ids"], reply.is_finished) == ([5, 6], True)


def test_an_abort_that_repeats_the_last_token_adds_nothing() -> None:
    reply = StreamedReply("http://host")
    scores = [[-0.5, 5, None], [-0.25, 6, None]]
    for number, piece in enumerate("ab"):
        added = event([5 + number], number + 1, output_token_logprobs=scores[number : number + 1])
        reply.add({**added, "text": piece})
    abort = event([6], 2, finish={"type": "abort", "message": "waiting"}, output_token_logprobs=scores)
    whole = reply.add({**abort, "text": "ab"})
    assert (whole["text"], whole["output_ids"], whole["meta_info"]["output_token_logprobs"]) == ("ab", [5, 6], scores)
    assert reply.is_finished


def test_an_error_in_a_stream_has_the_servers_status() -> None:
    with pytest.raises(RequestRejectedError, match="too long") as refused:
        StreamedReply("http://host").add({"error": {"message": "too long", "code": 400}})
    assert refused.value.status == 400
    aborted = event([], 0, finish={"type": "abort", "status_code": 503, "message": "queue is full"})
    with pytest.raises(RequestRejectedError, match="queue is full") as refused:
        StreamedReply("http://host").add(aborted)
    assert refused.value.status == 503
