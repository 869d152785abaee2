"""The page about benchmarks and its picture are made from the JSON; figures are medians of runs in turn."""

from __future__ import annotations

import importlib
import json
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of ``benchmarks/`` as the scripts import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def description(picture: Path) -> str:
    """The text ``Description`` of a PNG file, read without a library."""
    content, at = picture.read_bytes(), 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        if kind == b"tEXt" and data.startswith(b"Description\0"):
            return data.partition(b"\0")[2].decode()
        if kind == b"zTXt" and data.startswith(b"Description\0"):
            return zlib.decompress(data.partition(b"\0")[2][1:]).decode()
        at += 12 + length
    return ""


def row(name: str, ratio: float, pairs: int = 9, **more: Any) -> dict[str, Any]:
    return {"name": name, "ratio": ratio, "low": ratio, "high": ratio, "ratios": [ratio] * pairs, **more}


def section(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    machine = {"date": "today", "cores": 2, "versions": {}}
    known = {"command": "x", "status": "complete", "reason": "", "quick": False, "spread": "quartiles"}
    return {**known, "machine": machine, "rows": list(rows), **more}


def test_page_and_picture_are_those_of_the_json(load: Any) -> None:
    page = load("page")
    results = json.loads((DOCS / "benchmarks.json").read_text())
    again = "run: python benchmarks/page.py"
    assert (DOCS / "benchmarks.md").read_text() == page.page(results), again
    assert description(DOCS / "benchmarks.png") == page.digest(results), again


def test_every_section_has_a_title_and_a_script(load: Any) -> None:
    bench, page = load("bench"), load("page")
    assert set(bench.SECTIONS) == set(page.TITLES) == set(page.TEXTS)
    assert all((ROOT / "benchmarks" / section.script).exists() for section in bench.SECTIONS.values())


def test_runs_take_turns_and_each_is_first_as_often(load: Any) -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings, repeats = load("measuring").interleaved(runs, pairs=3, warm_ups=1, max_repeats=0)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(each) for name, each in timings.items()} == {"a": 3, "b": 3, "c": 3}
    assert repeats == 0


def test_a_row_is_the_median_of_the_ratios_of_each_round(load: Any, tmp_path: Path) -> None:
    measuring = load("measuring")
    assert measuring.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    record = measuring.Recorder("sync", tmp_path / "rows", repeats_left=0)
    [found] = record.measure("x", {"a": lambda: None, "b": lambda: None}, pairs=5, settings={"n": 1})
    assert found["ratio"] == pytest.approx(sorted(found["ratios"])[2], abs=1e-3)
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == [found]


def test_what_fails_is_recorded_and_the_next_row_is_measured(load: Any, tmp_path: Path) -> None:
    record = load("measuring").Recorder("sync", tmp_path / "rows", repeats_left=0)

    def fail() -> None:
        raise RuntimeError("the server has ended\nand more")

    record.measure("broken", {"a": lambda: None, "b": fail}, pairs=2)
    record.measure("whole", {"a": lambda: None, "b": lambda: None}, pairs=2)
    broken, whole = record.rows
    assert broken["error"] == "RuntimeError: the server has ended"
    assert "ratio" in whole
    (tmp_path / "rows").open("a").write('{"section": "sync", "na')  # the script is killed while it writes
    assert load("bench").read_rows(tmp_path / "rows") == [broken, whole]


def test_only_complete_sections_of_a_full_run_are_published(load: Any) -> None:
    results = {
        "sync": section(row("a", 1.0)),
        "policy": section(row("a", 1.0), status="failed", reason="it took too long"),
        "engine": section(row("a", 1.0), quick=True),
        "launch": section(row("a", 1.0, pairs=3)),
    }
    assert list(load("bench").publishable(results)) == ["sync"]


def test_a_missed_target_is_shown_with_the_phases(load: Any) -> None:
    rows = [
        row("ipc, 1 server", 1.9, paused=0.9, phases={"transfer": 1.2, "verify": 0.7}, seconds=1.0),
        row("ipc, 3 servers", 3.0, paused=2.0, seconds=1.5),
        {"name": "http, 1 server", "error": "ServerError: gone"},
        {"name": "peak extra memory, ipc", "value": "130 MB"},
    ]
    text = load("page").tables({"sync": section(*rows)})
    assert "| `ipc`, one server: whole sync | 1.80 | 1.90 | no |" in text
    assert "| `ipc`, one server: generation paused | 1.00 | 0.90 | yes |" in text
    assert "| `ipc`: three servers beside one | 1.80 | 1.50 | yes |" in text
    assert "| ipc, 1 server | 1.90 | 1.90 to 1.90 | 0.90 | transfer 1.20, verify 0.70 |" in text
    assert "| http, 1 server | not measured: ServerError: gone | | | |" in text
    assert "* peak extra memory, ipc: 130 MB" in text
    assert "Not measured yet: policy, engine, launch, import." in text
