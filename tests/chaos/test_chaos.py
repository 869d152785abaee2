"""The short form of ``make chaos``, and that its checks find what they look for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_lost_doubled_mislabelled_overdue_or_left_behind(needs_sglang: None, tmp_path: Path) -> None:
    report = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "tests.chaos", "--seconds", "45", "--seed", "11", "--report", str(report)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    arenas = json.loads(report.read_text())["arenas"]
    for arena in arenas.values():  # on a busy machine less happens in this time
        assert arena["tokens"] > 100
        assert arena["versions"] > 1
    assert arenas["fake"]["lives"] > 1
    assert len(arenas["fake"]["disturbances"]) >= 8
    assert [path.name for path in tmp_path.iterdir()] == ["chaos.json"]
