"""Replies and stream events of any form: read as SGLang means them, or refused with one of this package's errors."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sglang import (
    ClientConfig,
    ConfigError,
    ProtocolError,
    RequestRejectedError,
    RouterConfig,
    SamplingParams,
    ServerConfig,
    SyncConfig,
    WeightSyncError,
)
from torchrl_sglang.pool.checks import refuse_mixed_weights
from torchrl_sglang.protocol.dialect import parse_info
from torchrl_sglang.protocol.generate import parse_generate, parse_one
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.stream_events import StreamedReply
from torchrl_sglang.protocol.version import WeightVersion

SERVER = "http://host:1"
REPEATABLE = settings(derandomize=True, database=None, deadline=None, max_examples=150)

texts = st.text(max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
event_names = st.sampled_from(["output_ids", "meta_info", "error"])
versions = st.sampled_from(["default", "1@a", "2@a", "7@other", "dirty-3@a", "", "someone's"])


@st.composite
def replies(draw: st.DrawFn, *, finished: bool = True) -> dict[str, Any]:
    """A reply as SGLang sends it, with any number of weight versions."""
    ids = draw(st.lists(st.integers(0, 300), max_size=8))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=3)))
    bounds = [0, *cuts, len(ids)]
    spans = [
        {"version": draw(versions), "start": start, "end": end}
        for start, end in itertools.pairwise(bounds)
        if end > start
    ] or [{"version": "default", "start": 0, "end": len(ids)}]
    scores = [draw(st.none() | st.floats(-50, 0)) for _ in ids]
    meta: dict[str, Any] = {
        "id": "r",
        "finish_reason": {"type": draw(st.sampled_from(["stop", "length", "abort"]))} if finished else None,
        "prompt_tokens": 3,
        "completion_tokens": len(ids),
        "cached_tokens": draw(st.integers(0, 3)),
        "weight_version": spans[-1]["version"],
        "weight_versions": spans,
        "output_token_logprobs": [[score, token, None] for score, token in zip(scores, ids, strict=True)],
        "input_token_logprobs": [[None, 1, None], [-0.5, 2, None], [draw(st.none() | st.just(-1.5)), 3, None]],
        "e2e_latency": 0.25,
    }
    return {"text": "".join(chr(97 + token % 26) for token in ids), "output_ids": ids, "meta_info": meta}


def assert_sound(reply: GenerateReply) -> None:
    """What the rest of the package relies on."""
    num = len(reply.output_ids)
    assert all(type(token) is int and token >= 0 for token in reply.output_ids)
    assert reply.output_logprobs is not None
    assert len(reply.output_logprobs) == num
    assert all(type(value) is float for value in reply.output_logprobs)
    assert isinstance(reply.text, str)
    assert reply.finish_reason in ("stop", "length", "abort")
    for count in (reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens):
        assert type(count) is int
    if reply.weight_spans:
        assert [index for span in reply.weight_spans for index in range(span.start, span.end)] == list(range(num))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def with_at(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with ``new`` at a path; the path's last step is removed where ``new`` is ``...``."""
    if not path:
        return new
    value = copy.deepcopy(value)
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    if new is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


@REPEATABLE
@given(replies())
def test_every_reply_of_sglang_is_read_as_it_is(item: dict[str, Any]) -> None:
    (reply,) = parse_generate([item], num_expected=1, server=SERVER, prompt_logprobs=True)
    assert_sound(reply)
    assert reply.output_ids == item["output_ids"]
    sent = [entry[0] for entry in item["meta_info"]["output_token_logprobs"]]
    assert [None if math.isnan(value) else value for value in reply.output_logprobs or ()] == sent
    assert [(span.version, span.start, span.end) for span in reply.weight_spans] == [
        (span["version"], span["start"], span["end"]) for span in item["meta_info"]["weight_versions"]
    ]
    assert reply.prompt_logprobs is not None
    assert reply.prompt_logprobs[0] is None
    assert None not in reply.prompt_logprobs[1:]


@REPEATABLE
@given(st.data(), replies(), json_values | st.just(...))
def test_a_reply_with_anything_else_in_one_place_is_sound_or_refused(
    data: st.DataObject, item: dict[str, Any], new: Any
) -> None:
    path = data.draw(st.sampled_from(places(item)[1:]))
    changed = with_at(item, path, new)
    with contextlib.suppress(ProtocolError):
        assert_sound(parse_one(changed, server=SERVER, prompt_logprobs=True))


@REPEATABLE
@given(json_values, st.integers(1, 3))
def test_any_other_json_is_refused(answer: Any, num_expected: int) -> None:
    with pytest.raises(ProtocolError):
        parse_generate(answer, num_expected=num_expected, server=SERVER)


@pytest.mark.parametrize(
    "spans",
    [
        [("1@a", 0, 1)],
        [("1@a", 0, 2), ("2@a", 1, 3)],
        [("1@a", 1, 3)],
        [("2@a", 2, 3), ("1@a", 0, 2)],
        [("1@a", 0, 4)],
        [("1@a", 0, 5), ("2@a", 5, 3)],
        [("1@a", -1, 3)],
    ],
    ids=str,
)
def test_versions_that_do_not_cover_the_tokens_are_refused(spans: list[tuple[str, int, int]]) -> None:
    meta = {
        "finish_reason": {"type": "length"},
        "weight_versions": [{"version": version, "start": start, "end": end} for version, start, end in spans],
        "output_token_logprobs": [[-1.0, 5, None]] * 3,
    }
    with pytest.raises(ProtocolError, match="weight_versions for 3 tokens"):
        parse_one({"output_ids": [5, 5, 5], "meta_info": meta}, server=SERVER)


@REPEATABLE
@given(replies())
def test_exactly_the_replies_with_a_token_of_dirty_weights_are_refused(item: dict[str, Any]) -> None:
    reply = parse_one(item, server=SERVER)
    dirty = any(
        WeightVersion.parse(span["version"]).dirty and span["end"] > span["start"]
        for span in item["meta_info"]["weight_versions"]
    )
    with pytest.raises(WeightSyncError) if dirty else contextlib.nullcontext():
        refuse_mixed_weights([reply])


# -------------------------------------------------------------------------------------------------------------- streams


def events_of(item: dict[str, Any], ends: list[int], *, incremental: bool) -> list[dict[str, Any]]:
    """A reply as the events of a stream, which end after these numbers of tokens."""
    events, start = [], 0
    for end in ends:
        first = start if incremental else 0
        event = copy.deepcopy(item)
        event["output_ids"] = item["output_ids"][first:end]
        event["text"] = item["text"][first:end]
        meta = event["meta_info"]
        meta["output_token_logprobs"] = meta["output_token_logprobs"][first:end]
        meta["completion_tokens"] = end
        if end < len(item["output_ids"]) or len(events) < len(ends) - 1:
            meta["finish_reason"] = None
            del meta["weight_versions"]
        events.append(event)
        start = end
    return events


@REPEATABLE
@given(st.data(), replies(), st.booleans())
def test_a_reply_in_pieces_is_the_whole_one(data: st.DataObject, item: dict[str, Any], incremental: bool) -> None:
    num = len(item["output_ids"])
    ends = [*sorted(data.draw(st.sets(st.integers(1, max(1, num - 1)), max_size=4)) if num > 1 else []), num]
    stream = StreamedReply(SERVER)
    for event in events_of(item, ends, incremental=incremental):
        assert not stream.is_finished
        whole = stream.add(event)
    assert stream.is_finished
    assert repr(parse_one(whole, server=SERVER)) == repr(parse_one(item, server=SERVER))  # repr: NaN equals NaN


@REPEATABLE
@given(st.data(), replies(), st.booleans())
def test_a_stream_with_a_lost_or_repeated_event_is_whole_or_refused(
    data: st.DataObject, item: dict[str, Any], incremental: bool
) -> None:
    num = len(item["output_ids"])
    events = events_of(item, list(range(1, num + 1)) or [0], incremental=incremental)
    index = data.draw(st.integers(0, len(events) - 1))
    damaged = events[:index] + data.draw(st.sampled_from([[], [events[index]] * 2])) + events[index + 1 :]
    stream = StreamedReply(SERVER)
    try:
        whole = [parse_one(stream.add(event), server=SERVER) for event in damaged]
    except ProtocolError:
        return
    if stream.is_finished:
        assert whole[-1].output_ids == item["output_ids"]


@REPEATABLE
@given(
    st.lists(
        json_values | st.dictionaries(st.sampled_from(["output_ids", "meta_info", "error"]), json_values), min_size=1
    )
)
def test_any_other_event_is_refused(events: list[Any]) -> None:
    stream = StreamedReply(SERVER)
    with pytest.raises((ProtocolError, RequestRejectedError)):
        for event in events:
            parse_one(stream.add(event), server=SERVER)


@REPEATABLE
@given(st.data(), json_values | st.just(...))
def test_a_servers_description_with_anything_in_one_place_is_read_or_refused(data: st.DataObject, new: Any) -> None:
    both = [
        {
            "model_path": "m",
            "tokenizer_path": "m",
            "is_generation": True,
            "weight_version": "1",
            "architectures": ["L"],
        },
        {"version": "0.5.23", "tp_size": 1, "dp_size": 1, "pp_size": 1, "max_req_input_len": 9, "api_key": "secret"},
    ]
    path = data.draw(st.sampled_from([place for place in places(both) if len(place) >= 1]))
    model_info, server_info = with_at(both, path, new) if new is not ... or len(path) > 1 else both
    try:
        info = parse_info(model_info, server_info, url=SERVER)
    except (ProtocolError, ConfigError):
        return
    assert "secret" not in str(info.raw)


# ------------------------------------------------------------------------------------------------------------- settings

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.just(10**400),
    st.floats(),
    texts,
    st.binary(max_size=3),
    st.lists(texts, max_size=2),
    st.dictionaries(texts, st.integers() | texts, max_size=2),
    st.just(Path("x")),
    st.just(object()),
)
RECORDS: dict[type[Any], dict[str, Any]] = {
    ClientConfig: {},
    ServerConfig: {"model": "m"},
    RouterConfig: {},
    SyncConfig: {},
    SamplingParams: {},
}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
@REPEATABLE
@given(st.data())
def test_settings_of_any_kind_are_taken_or_refused(record: type[Any], data: st.DataObject) -> None:
    names = [field.name for field in fields(record) if field.init]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    given_ = RECORDS[record] | {name: data.draw(odd) for name in chosen}
    try:
        config = record(**given_)
    except ConfigError:
        return
    assert repr(replace(config)) == repr(config)
    if not any(type(value) is object for value in given_.values()):
        assert repr(pickle.loads(pickle.dumps(config))) == repr(config)
