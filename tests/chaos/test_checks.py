"""The checks of a chaos run find what they look for: made-up journals with one thing wrong each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.journal import Journal, read_journals
from tests.chaos.limits import MAX_GENERATE_S, MAX_PUSH_S
from tests.chaos.trainer import Prompts, prompt_ids
from tests.chaos.verdict import Verdict, judge
from tests.fake_sglang.model import logprobs, read_checkpoint, signature

SEATS = ["http://a:1", "http://b:1"]
SIGNATURES = {"1@t": 11, "2@t": 22}
Records = list[dict[str, Any]]


@pytest.fixture
def check(tiny_llama: Path, tmp_path: Path) -> Callable[[Callable[[Records], object]], Verdict]:
    """``check(change)``: the verdict on a sound journal after ``change`` has been made to its records."""
    signatures = SIGNATURES | {"default": signature(read_checkpoint(tiny_llama))}

    def answer(number: int, spans: list[list[Any]]) -> dict[str, Any]:
        ids = [7 + number, 8, 9, 10, 11, 12, 13, 14]
        values: list[float] = []
        whole = prompt_ids(number) + ids
        for version, start, end in spans:
            scores = logprobs(signatures[version], whole, 320)[-len(ids) :]
            values += [score or 0.0 for score in scores[start:end]]
        return {
            "prompt": number,
            "ids": ids,
            "logprobs": values,
            "spans": spans,
            "server": SEATS[0],
            "finish": "length",
        }

    def verdict(change: Callable[[Records], object]) -> Verdict:
        records: Records = [
            {"kind": "life", "transport": "shared", "owner": "t"},
            *({"kind": "version", "version": version, "signature": mark} for version, mark in SIGNATURES.items()),
            {"kind": "asked", "prompts": [0, 1, 2]},
            {"kind": "wait", "what": "generate", "seconds": 1.0, "error": None},
            {"kind": "answers", "answers": [answer(0, [["default", 0, 8]]), answer(1, [["1@t", 0, 8]])]},
            {"kind": "answers", "answers": [answer(2, [["1@t", 0, 3], ["2@t", 3, 8]])]},
            {"kind": "push", "version": "2@t", "seconds": 1.0, "disk_full": False, "error": None, "server_weights": {}},
            {"kind": "end", "settled_s": 1.0, "all_answered": True, "serving": ["2@t"] * 2, "quarantined": {}},
        ]
        change(records)
        journal = Journal(tmp_path / "journal-0000.jsonl")
        for record in records:
            journal.write(**record)
        return judge(tmp_path, tiny_llama, kind="fake", seat_urls=SEATS)

    return verdict


def test_a_sound_run_has_no_findings(check: Callable[..., Verdict]) -> None:
    verdict = check(lambda records: None)
    assert verdict.findings == []
    assert (verdict.prompts, verdict.tokens, verdict.versions, verdict.syncs) == (3, 24, 3, 1)
    assert verdict.other_version_gap > 0.1


def set_in(index: int, path: list[Any], value: Any) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        inner: Any = records[index]
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in(3, ["prompts"], [0, 1, 2, 3]), "1 lost"),
        (lambda records: records.append(records[5]), "2 doubled"),
        (set_in(5, ["answers", 1, "spans"], [["2@t", 0, 8]]), "8 wrong tokens"),
        (set_in(6, ["answers", 0, "spans"], [["1@t", 0, 4], ["2@t", 4, 8]]), "1 wrong tokens"),
        (set_in(6, ["answers", 0, "spans"], [["1@t", 0, 3]]), "8 tokens in"),
        (set_in(6, ["answers", 0, "spans"], [["9@x", 0, 8]]), "'9@x', which nobody sent"),
        (set_in(6, ["answers", 0, "logprobs"], [float("nan")] * 8), "8 wrong tokens"),
        (set_in(4, ["seconds"], MAX_GENERATE_S + 1), "generate took"),
        (set_in(7, ["seconds"], MAX_PUSH_S + 1), "push took"),
        (set_in(7, ["disk_full"], True), "a push to a full disk succeeded"),
        (set_in(8, ["serving"], ["2@t", "1@t"]), "at the end servers answer as"),
        (set_in(8, ["quarantined"], {SEATS[0]: "why"}), "at the end"),
        (set_in(8, ["kind"], "other"), "the last trainer did not finish"),
        (lambda records: records.append({"kind": "crash", "traceback": "ValueError"}), "crash: ValueError"),
    ],
)
def test_one_thing_wrong_is_found(
    check: Callable[..., Verdict], change: Callable[[Records], object], message: str
) -> None:
    assert any(message in finding for finding in check(change).findings)


def test_a_killed_trainers_half_line_does_not_count_and_its_prompts_are_asked_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal-0000.jsonl")
    journal.write("asked", prompts=[0, 1])
    journal.write("answers", answers=[{"prompt": 0}])
    with (tmp_path / "journal-0000.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "answers", "answers": [{"prompt": 1}]}))  # killed before the end of the line
    assert len(list(read_journals(tmp_path))) == 2
    prompts = Prompts(tmp_path)
    assert prompts.take(5) == [1]
    assert prompts.take(2) == [2, 3]
