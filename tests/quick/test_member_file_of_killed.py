"""The file that tells copies of a pool its members does not outlive its process for long, even one that was killed."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from torchrl_sglang.pool.member_file import MemberFile


def test_a_file_that_is_replaced_while_somebody_looks_for_abandoned_ones_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living = MemberFile()
    living.write({"http://a:1": None})
    lock = fcntl.flock

    def lock_after_a_change(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        living.write({"http://b:1": None})
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", lock_after_a_change)
    MemberFile()
    assert MemberFile(living.path).read_if_new() == {"http://b:1": None}
    living.delete()


def test_a_file_that_was_just_being_written_is_deleted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    no_process = 2**22 + 1  # above the largest that Linux gives
    killed, writing = (MemberFile().path.with_suffix(f".{pid}.new") for pid in (no_process, os.getpid()))
    for path in (killed, writing):
        path.write_text("[")
    MemberFile()
    assert set(tmp_path.iterdir()) == {writing}


def test_files_that_nobody_holds_are_deleted_by_the_next_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living, killed = MemberFile(), MemberFile()
    living.write({"http://a:1": None})
    living.write({"http://a:1": None, "http://b:1": None})
    killed.path.write_text("[]")  # without a lock, as a killed process leaves it
    reader = MemberFile(living.path)
    assert reader.read_if_new() == {"http://a:1": None, "http://b:1": None}
    another = MemberFile()
    assert set(tmp_path.iterdir()) == {living.path}
    another.write({"http://c:1": None})
    living.write({"http://a:1": None})
    assert reader.read_if_new() == {"http://a:1": None}
    living.delete()
    another.delete()
    assert not any(tmp_path.iterdir())
