"""`make bench` keeps what a section has measured, whatever becomes of its script, and goes on."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = {"section": "sync", "name": "a", "ratio": 1.5}
WRITE = f"""
import json, sys, time
with open(sys.argv[sys.argv.index("--rows") + 1], "a") as file:
    file.write(json.dumps({ROW!r}) + "\\n")
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench")


@pytest.mark.parametrize(
    ("rest", "status", "reason"),
    [
        ("", "complete", ""),
        ("sys.exit(3)", "failed", "its script ended with status 3"),
        ("time.sleep(600)", "failed", "it took longer than 5 s"),
    ],
)
def test_a_section_that_fails_or_hangs_keeps_its_rows(
    bench: Any, tmp_path: Path, rest: str, status: str, reason: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(WRITE + rest)
    section = bench.Section(str(script), (), (), 5)
    found = bench.run_section("sync", section, tmp_path, quick=False, limit_s=5 if "sleep" in rest else 60)
    assert (found["status"], found["reason"], found["rows"]) == (status, reason, [ROW])
    bench.write_results({"sync": found}, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["sync"]["rows"] == [ROW]


def test_an_interrupted_section_keeps_its_rows_and_its_script_ends(bench: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WRITE + "time.sleep(600)")

    def interrupt() -> None:
        while not (tmp_path / "rows-sync.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    found = bench.run_section("sync", bench.Section(str(script), (), (), 60), tmp_path, quick=True, limit_s=120)
    thread.join()
    assert (found["status"], found["reason"]) == ("failed", bench.INTERRUPTED)
    assert found["rows"] in ([ROW], [])  # it may have been interrupted between opening and writing
