"""The short form of ``make soak``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nothing_grows_in_a_minute(needs_sglang: None, tmp_path: Path) -> None:
    """An hour shows what grows slowly; a minute shows a descriptor or thread that each sync or batch leaves."""
    report = tmp_path / "soak.json"
    command = [sys.executable, "-m", "tests.soak", "--seconds", "60", "--report", str(report)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380, check=False)
    assert run.stdout, run.stderr[-4000:]
    found = json.loads(report.read_text())
    # Latency and memory of a minute are noise on a busy machine.
    serious = [each for each in found["findings"] if "descriptors" in each or "threads" in each or "ended" in each]
    assert not serious, run.stdout
    assert found["syncs"] > 10
