"""A program that closes no collector, scheme or server connection still exits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import requests

from torchrl_sglang.server import SGLangServer

CLOSES_NOTHING = """
import sys
from pathlib import Path

from tensordict import set_list_to_stack
from tests.loop.sync_cases import load, make_collector
from torchrl_sglang import SGLangWeightSyncScheme

set_list_to_stack(True).set()
url, folder, other = sys.argv[1:]
scheme = SGLangWeightSyncScheme(url)
collector = make_collector(url, Path(folder), scheme)
model = load(other)
for batch in collector:
    collector.update_policy_weights_(model)
    break
print("version", scheme.last_report.version, flush=True)
"""


def test_a_program_that_closes_nothing_exits_and_leaves_the_server_ready(
    pristine_server: SGLangServer, tiny_llama: Path, tiny_llama_b: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLOSES_NOTHING, pristine_server.url, str(tiny_llama), str(tiny_llama_b)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "version 1" in done.stdout
    assert requests.get(pristine_server.url + "/ready", timeout=10).status_code == 200
