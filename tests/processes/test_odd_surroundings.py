"""``transport="auto"`` where shared memory or the folder for temporary files are not what they usually are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServerProcess, FakeSettings

EXPECTED = {
    "as it is": ("ipc", "it shares this host's memory"),
    "another /dev/shm": ("broadcast", "has another /dev/shm: it, or this process, runs in a container"),
    "read-only": ("broadcast", "no file can be written to /dev/shm (Read-only file system)"),
    "no programs from it": ("ipc", "it shares this host's memory"),
    "none": ("broadcast", "this system has no /proc or no /dev/shm"),
    "another TMPDIR": ("ipc", "it shares this host's memory"),
    "a TMPDIR that is not there": ("ipc", "it shares this host's memory"),
    "a long TMPDIR": ("ipc", "it shares this host's memory"),
    "own: room": ("ipc", "it shares this host's memory"),
    "own: too small": ("broadcast", "/dev/shm has room for 0.1 MB, and two buckets need"),
    "own: too few files": ("broadcast", "/dev/shm has no room for 0 MB of weights (No space left on device"),
    "own: files too large": ("broadcast", "/dev/shm has no room for 0 MB of weights (File too large"),
}


def has_mounts() -> bool:
    """Whether this user may mount file systems for a process of its own."""
    if shutil.which("unshare") is None:
        return False
    mount = "mkdir -p $0 && mount -t tmpfs tmpfs $0"
    folder = f"/tmp/torchrl-sglang-mount-test-{os.getpid()}"
    try:
        done = subprocess.run(["unshare", "-m", "sh", "-c", mount, folder], capture_output=True, check=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_mounts(), reason="this user may not mount file systems")
def test_auto_finds_out_what_can_be_shared_and_says_why_not(tiny_llama: Path, tmp_path: Path) -> None:
    program = Path(__file__).with_name("odd_surroundings.py")
    before = set(Path("/dev/shm").iterdir())
    with FakeServerProcess(FakeSettings(model_path=tiny_llama, is_found=True)) as server:
        command = ["unshare", "-m", "--propagation", "private", sys.executable, str(program)]
        done = subprocess.run(
            [*command, server.url, str(tiny_llama), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(program.parents[2])},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == EXPECTED.keys()
    for name, (transport, reason) in EXPECTED.items():
        assert (name, found[name]["transport"]) == (name, transport), found[name]
        assert reason in found[name]["reason"], name
    assert [path for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith("torchrl-")] == []
