"""The log of a launched program: bounded, without keys, and never a reason for the program to stop."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchrl_sglang.server.managed_process import read_end
from torchrl_sglang.server.supervisor import RotatedLog, copy_log, rotated_path


def test_a_log_is_rotated_and_its_end_is_read_across_the_two_files(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    lines = [f"line {number:04d}\n".encode() for number in range(1000)]
    log = RotatedLog(path, max_bytes=1000)
    for line in lines:
        log.write(line)
    assert path.stat().st_size <= 1000
    assert rotated_path(path).stat().st_size <= 1000
    assert sorted(each.name for each in tmp_path.iterdir()) == ["server.log", "server.log.1"]
    assert read_end(path, 100) == b"".join(lines)[-100:].decode()
    path.write_bytes(lines[-1])
    assert read_end(path, 30).endswith(lines[-1].decode())
    assert len(read_end(path, 30)) == 30  # filled up from the rotated file


def test_a_program_goes_on_while_its_log_cannot_be_written_and_the_log_says_what_was_lost(tmp_path: Path) -> None:
    """A pipe holds 64 KB: a program that writes more than that blocks if nobody reads."""
    path = tmp_path / "folder" / "server.log"  # the folder is missing: every write fails
    program = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdout.write('x' * 99 + '\\n')\nfor _ in range(9999): print('y' * 99)"],
        stdout=subprocess.PIPE,
    )
    assert program.stdout is not None
    log = RotatedLog(path)
    copy_log(program.stdout, log, [])
    assert program.wait(60) == 0
    path.parent.mkdir()
    log.write(b"later\n")
    first, second = path.read_text().splitlines()
    assert first == "[1000000 bytes of output were lost: No such file or directory]"
    assert second == "later"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_stop_the_copying(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.symlink_to("/dev/full")  # every write to it fails with "No space left on device"
    log = RotatedLog(path)
    copy_log(io.BufferedReader(io.BytesIO(b"one\ntwo\n")), log, [])  # type: ignore[arg-type]
    path.unlink()
    log.write(b"three\n")
    assert path.read_text() == f"[8 bytes of output were lost: {os.strerror(28)}]\nthree\n"


def test_keys_are_blacked_out_also_where_a_line_has_no_end(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    copy_log(
        io.BufferedReader(io.BytesIO(b"api_key=s3cret\nrest s3cret")),  # type: ignore[arg-type]
        RotatedLog(path),
        [b"s3cret"],
    )
    assert path.read_text() == "api_key=***\nrest ***"
