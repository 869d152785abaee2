"""What a stream tells of a growing answer is what the whole text so far says, computed anew for each token."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from tests.matrix.tokenizer_kinds import make_tokenizer
from tests.quick.agent_templates import QWEN3
from torchrl_sglang.agents.conversation.answers import Written, decode_answer, find_calls, read_answer
from torchrl_sglang.agents.conversation.progress import Gained, ProgressText
from torchrl_sglang.agents.conversation.template import AgentTemplate
from torchrl_sglang.agents.generated import Generated
from torchrl_sglang.agents.server_events import Growth
from torchrl_sglang.agents.sharing import PendingTurn
from torchrl_sglang.agents.streamed_part import StreamedPart
from torchrl_sglang.agents.types import Progress
from torchrl_sglang.chat.quoted_text import THINKING, Thinking
from torchrl_sglang.errors import ProtocolError
from torchrl_sglang.protocol.generate import parse_one
from torchrl_sglang.protocol.stream_events import StreamedReply

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
PIECES = (
    *(
        "the dog ",
        "a",
        " ",
        "\n",
        "\n\n",
        "<",
        "<|",
        "<|im",
        "<|im_end",
        "é",
        "犬",
        "👩🏽",
        "{",
        "[",
        '"',
        "Obs",
        ": ",
        "O",
    ),
    *("<think>", "</think>", "</thi", "<th", "<reasoning>", "</reasoning>", "<tool_call>", "<tool", "</tool_call>"),
    *('{"name": "add", "arguments": {}}', "<function=add>{}</function>", "<|im_end|>", "<|im_start|>", "END", "EN"),
)


@pytest.fixture(scope="module")
def template() -> AgentTemplate:
    return AgentTemplate(make_tokenizer("byte-level BPE", QWEN3))


# ------------------------------------------------------------------ the rules, each for the whole text


def held(text: str, marks: Sequence[str], *, or_whole: bool = False) -> int:
    """Number of last characters that may be the beginning of a mark."""
    sizes = [n for mark in marks for n in range(1, len(mark) + or_whole) if text.endswith(mark[:n])]
    return max(sizes, default=0)


def without_end(text: str, marks: Sequence[str], *, or_whole: bool = False) -> str:
    return text[: len(text) - held(text, marks, or_whole=or_whole)]


class WholeTexts:
    """Computes everything from the whole text, as slowly as can be."""

    def __init__(self, template: AgentTemplate, marks: Sequence[str], **given: Any) -> None:
        self.template, self.marks, self.given = template, marks, given
        self.has_content = False

    def of(self, ids: Sequence[int]) -> Gained | None:
        """Text, content and reasoning so far; ``None`` if the last character is not complete."""
        if ids and ids[-1] in self.template.special:
            ids = ids[:-1]
        text = self.template.decode(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return None
        stops = self.given["stops"]
        text = text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
        text = without_end(text.rstrip("\N{REPLACEMENT CHARACTER}"), stops, or_whole=True)
        thinking, rest = self.split(text)
        if self.given["has_tools"]:
            content = self.cleaned(self.before_calls(rest)).strip()
        else:
            openings = [opening for opening, _ in THINKING]
            content = self.cleaned(rest if self.has_content else without_end(rest, openings))
        self.has_content = self.has_content or bool(content)
        return Gained(text=self.cleaned(text), content=content, reasoning=self.cleaned(thinking).strip())

    def cleaned(self, text: str) -> str:
        return self.template.without_marks(without_end(text, self.marks))

    def split(self, text: str) -> tuple[str, str]:
        body, opened = text.lstrip(), self.given["thinks"]
        if opened is None:
            opened = next((pair for pair in THINKING if body.startswith(pair[0])), None)
            if opened is None:
                return "", "" if any(opening.startswith(body) for opening, _ in THINKING) else text
        elif opened[0].startswith(body) and body != opened[0]:
            return "", ""
        thinking, closing, rest = body.removeprefix(opened[0]).partition(opened[1])
        return (thinking, rest.lstrip()) if closing else (without_end(thinking, [opened[1]]), "")

    def before_calls(self, rest: str) -> str:
        marks = ("<tool_call>", "<|tool_call|>", "<TOOLCALL>", "<function=", "[TOOL_CALLS]", "<|python_tag|>")
        marks = (*marks, "<|python_start|>")
        if not self.given["reads_here"] or rest.lstrip()[:1] in ("", "{", "["):
            return ""
        starts = [rest.find(mark) for mark in marks if mark in rest]
        return rest[: min(starts)] if starts else without_end(rest, marks)


def marks_of(template: AgentTemplate) -> list[str]:
    texts = [str(token.content) for token in template.tokenizer.added_tokens_decoder.values() if token.special]
    return [text for text in texts if len(text) > 1]


@pytest.mark.parametrize("seed", range(150))
def test_each_token_tells_what_the_whole_text_so_far_says_and_the_answer_begins_with_it(
    template: AgentTemplate, seed: int
) -> None:
    rng = random.Random(seed)
    ids: list[int] = []
    for _ in range(rng.randrange(1, 40)):
        ids += template.tokenizer(rng.choice(PIECES), add_special_tokens=False)["input_ids"]
    thinks: Thinking | None = rng.choice([None, None, THINKING[0], THINKING[3]])
    given: dict[str, Any] = {
        "stops": rng.choice([(), (), ("END",), ("Obs:", "END", "\n\nO")]),
        "has_tools": rng.random() < 0.5,
        "reads_here": rng.random() < 0.9,
        "thinks": thinks,
    }
    fast, slow = ProgressText(template, **given), WholeTexts(template, marks_of(template), **given)
    told, expected, count = Gained(), Gained(), 0
    while count < len(ids) and not fast.is_stopped:
        count = min(len(ids), count + rng.choice([1, 1, 1, 2, 7]))
        new = fast.push(ids[:count])
        told = Gained(*(before + gained for before, gained in zip(told, new, strict=True)))
        now = slow.of(ids[:count]) or expected
        # What was told stays, as "EN" does of the text "ENE", although it stands before the stop string of "ENEND".
        expected = Gained(*(b if b.startswith(a) else a for a, b in zip(expected, now, strict=True)))
        assert told == expected, (given, template.decode(ids[:count]))
    check_final(template, ids[:count], told, given)


def check_final(template: AgentTemplate, ids: list[int], told: Gained, given: dict[str, Any]) -> None:
    """The finished answer begins with what was told of it."""
    text = template.decode(ids)
    found_stops = [stop for stop in given["stops"] if stop in text]
    if found_stops:
        ending: dict[str, Any] = {"finish_reason": "stop", "matched": min(found_stops, key=text.find)}
        end = text.find(ending["matched"])
        written = Written(text=text[:end], beyond=text[end:])
    else:
        written = decode_answer(ids, finish_reason="length", matched=None, template=template)
    opened = "" if given["thinks"] is None else given["thinks"][0]
    found = find_calls(written.text, [TOOL], prompt_text=opened, is_cut=True) if given["has_tools"] else None
    answer = read_answer(written, found, prompt_text=opened, prompt_ids=[1], output_ids=ids, template=template)
    assert template.without_marks(written.text).startswith(told.text)
    assert answer.content.startswith(told.content)
    assert (answer.reasoning or "").startswith(told.reasoning)


def test_bytes_that_are_no_text_are_looked_at_now_and_then_and_the_text_behind_them_is_told(
    template: AgentTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    (half,) = [i for i in range(300) if template.tokenizer.convert_ids_to_tokens(i) == "Ã"]  # the first of two bytes
    ids = [half] * 400 + template.tokenizer(" the dog and the dog" * 60, add_special_tokens=False)["input_ids"]
    decoded: list[int] = []
    decode = template.decode
    monkeypatch.setattr(template, "decode", lambda part: (decoded.append(len(part)), decode(part))[1])
    progress = ProgressText(template)
    told = "".join(progress.push(ids[:count]).text for count in range(1, len(ids) + 1))
    assert told.endswith("the dog and the dog")
    assert sum(decoded) < 100 * len(ids)


# ------------------------------------------------------------------ events


def stream_of(rng: random.Random, count: int, *, incremental: bool) -> list[dict[str, Any]]:
    """Events of an answer, as SGLang writes them."""
    ids, values = [rng.randrange(1000) for _ in range(count)], [-rng.random() for _ in range(count)]
    ends = sorted({*rng.sample(range(1, count), min(count - 1, rng.randrange(1, 9))), count})
    events = []
    for start, end in pairwise([0, *ends]):
        start = start if incremental else 0
        meta: dict[str, Any] = {"id": "x", "completion_tokens": end, "cached_tokens": 3, "weight_version": "2@a"}
        meta["finish_reason"] = None if end < count else {"type": "length", "length": count}
        meta["output_token_logprobs"] = [[values[i], ids[i], None] for i in range(start, end)]
        meta["output_top_logprobs"] = [[[values[i], ids[i], None]] for i in range(start, end)]
        events.append({"text": "t" * (end - start), "output_ids": ids[start:end], "meta_info": meta})
    events[-1]["meta_info"]["weight_versions"] = [
        {"version": "1@a", "start": 0, "end": 1},
        {"version": "2@a", "start": 1, "end": count},
    ]
    return events


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_events_add_up_to_the_reply_that_a_reader_of_whole_events_makes_of_them(incremental: bool, seed: int) -> None:
    rng = random.Random(seed)
    done = Generated(output_ids=[7] * (seed % 3), log_probs=[-1.0] * (seed % 3), top_log_probs=[None] * (seed % 3))
    events = stream_of(rng, 2 + seed, incremental=incremental)
    part, whole = StreamedPart(done, server="http://host"), StreamedReply("http://host")
    for number, event in enumerate(json.loads(json.dumps(events))):
        finished, expected = part.add(event), whole.add(event)
        assert (finished is not None) == (number == len(events) - 1)
        reply = parse_one(expected, server="http://host")
        if finished is None:
            assert part.so_far.output_ids == done.output_ids + reply.output_ids
            assert part.so_far.log_probs == done.log_probs + (reply.output_logprobs or [])
            assert part.so_far.top_log_probs == done.top_log_probs + expected["meta_info"]["output_top_logprobs"]
        else:
            assert replace(parse_one(finished, server="http://host"), text="") == replace(reply, text="")
            assert finished["meta_info"]["output_top_logprobs"] == expected["meta_info"]["output_top_logprobs"]


@pytest.mark.parametrize("incremental", [False, True])
def test_an_abort_that_repeats_the_last_token_adds_none(incremental: bool) -> None:
    events = stream_of(random.Random(1), 6, incremental=incremental)
    known = [token for event in events[:-1] for token in event["output_ids"]] if incremental else []
    known = known or events[-2]["output_ids"]
    meta = {"completion_tokens": len(known), "finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}
    part = StreamedPart(Generated(), server="http://host")
    for event in events[:-1]:
        assert part.add(event) is None
    finished = part.add({"text": "", "output_ids": known[-1:], "meta_info": meta})
    assert finished is not None
    assert parse_one(finished, server="http://host").output_ids == known


def test_a_stream_of_which_a_part_is_lost_is_refused() -> None:
    events = stream_of(random.Random(2), 9, incremental=True)
    part = StreamedPart(Generated(), server="http://host")
    part.add(events[0])
    with pytest.raises(ProtocolError, match="part of the stream is lost"):
        part.add(events[2])
    with pytest.raises(ProtocolError, match="not what SGLang promises"):
        StreamedPart(Generated(), server="http://host").add({"meta_info": {}})


def test_the_work_of_reading_events_that_repeat_all_tokens_grows_with_the_answer_not_with_its_square() -> None:
    growth, read, known = Growth(), [], 0
    entry = b"[-0.123456,12345,null],"
    for count in range(1000, 50_000):
        size = count * len(entry)
        if size < growth._least:  # the bytes need not be made to see that they are left out
            continue
        data = b'{"finish_reason":null,' + entry * count
        read += [len(each) for each in growth.worth_reading([data])]
        assert count - known < count / 200 or not known, "an event is read when the answer has grown by half a percent"
        known = count
    assert sum(read) < 600 * max(read)
    last = b'{"finish_reason":{"type":"length"},'
    assert list(growth.worth_reading([last, b"[DONE]"])) == [last, b"[DONE]"]


def test_an_event_that_was_left_out_is_read_before_an_abort_that_has_the_last_token_alone() -> None:
    growth = Growth()
    events = [b'{"finish_reason":null,"ids":' + b"1" * size for size in (70_000, 70_010)]
    abort = b'{"finish_reason":{"type":"abort"}}'
    assert list(growth.worth_reading(events)) == events[:1]
    assert list(growth.worth_reading([abort])) == [events[1], abort]


def test_who_joins_a_turn_late_is_told_all_of_it_and_few_reports_are_kept() -> None:
    import asyncio

    async def story() -> None:
        reported = asyncio.Event()

        async def sample(report: Any) -> Any:
            for number in range(1000):
                report(Progress(index=0, text=f"{number} ", token_ids=(number,), log_probs=(-0.5,)))
            reported.set()
            await asyncio.Event().wait()

        turn = PendingTurn(sample, streams=True)
        await reported.wait()
        assert len(turn._reports[0]) <= 10
        late: list[Progress] = []
        joined = asyncio.ensure_future(turn.result(late.append))
        await asyncio.sleep(0)
        assert late[0].token_ids == tuple(range(1000))
        assert late[0].text == "".join(f"{number} " for number in range(1000))
        joined.cancel()
        await asyncio.wait([joined])

    asyncio.run(story())
