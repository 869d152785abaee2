"""Children that are forked while threads of their parent verify, push, wait or hold locks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.fake_sglang import FakeServer, FakeSettings


def test_they_work_and_leave_their_parents_groups_alone(tiny_llama: Path) -> None:
    program = Path(__file__).with_name("forked_meanwhile.py")
    settings = FakeSettings(model_path=tiny_llama)
    with FakeServer(settings) as first, FakeServer(settings) as second:
        done = subprocess.run(
            [sys.executable, str(program), str(tiny_llama), first.url, second.url],
            env={**os.environ, "PYTHONPATH": str(program.parents[2]), "OMP_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.stdout.strip().endswith("all done"), done.stdout + done.stderr
        assert len([event for event in first.events if event["path"] == "/init_weights_update_group"]) == 1
