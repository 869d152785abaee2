"""Wall clocks jump, and those of file servers differ from this machine's: nothing depends on them."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import pytest

import torchrl_sglang
from torchrl_sglang.pool.server_list import reader_of
from torchrl_sglang.weights.transports.disk import _is_abandoned

PACKAGE = Path(torchrl_sglang.__file__).parent
DAY_S = 86_400.0
WALL_CLOCKS = re.compile(r"\b(time\.time(_ns)?|datetime\.(now|utcnow)|date\.today)\(")
ALLOWED = {"agents/http/model_routes.py"}  # "created" of OpenAI's replies


def test_no_module_measures_with_a_wall_clock() -> None:
    names = (path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    assert {name for name in names if WALL_CLOCKS.search((PACKAGE / name).read_text())} <= ALLOWED


def test_a_list_that_is_being_written_is_not_read_half_whatever_its_time_stamps_say(tmp_path: Path) -> None:
    path = tmp_path / "servers"
    urls = [f"http://10.0.0.{number}:30000" for number in range(20)]
    path.write_text("\n".join(urls[:10]))
    yesterday = time.time() - DAY_S
    os.utime(path, (yesterday, yesterday))  # this machine's clock has jumped
    read = reader_of(path)

    def finish() -> None:
        path.write_text("\n".join(urls))
        os.utime(path, (yesterday, yesterday))

    writing = threading.Timer(0.05, finish)
    writing.start()
    first = read()
    writing.join()
    assert first == urls or read() == urls
    tomorrow = time.time() + DAY_S
    os.utime(path, (tomorrow, tomorrow))
    assert read() == urls
    start = time.monotonic()
    for _ in range(20):
        assert read() == urls
    assert time.monotonic() - start < 2, "an unchanged file is read at once"


@pytest.mark.parametrize("jump_s", [-DAY_S, DAY_S])
def test_a_folder_that_is_being_written_is_not_abandoned_because_a_clock_has_jumped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    folder = tmp_path / "version-1.partial-of-another-host"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump_s)
    assert not _is_abandoned(folder)
    assert list(tmp_path.iterdir()) == [folder]
    hours_ago = now() - 2 * 3600
    for path in (folder / "model.safetensors", folder):
        os.utime(path, (hours_ago, hours_ago))
    assert _is_abandoned(folder)
