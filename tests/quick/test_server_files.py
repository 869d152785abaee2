"""Files that list servers, as editors, scripts and mistakes leave them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang import AsyncSGLang, ConfigError, ServerError
from torchrl_sglang.pool.server_list import read_server_file, reader_of

Make = Callable[..., FakeServer]


def test_a_file_that_is_just_being_written_is_not_read_half(tmp_path: Path) -> None:
    file = tmp_path / "servers.txt"
    file.write_text("http://a:1\n")

    def finish() -> None:
        time.sleep(0.05)
        with file.open("a") as rest:
            rest.write("http://b:1\n")

    writer = threading.Thread(target=finish)
    writer.start()
    assert reader_of(file)() == ["http://a:1", "http://b:1"]
    writer.join()


def test_the_mark_at_the_beginning_that_some_editors_write_is_no_part_of_a_url(tmp_path: Path) -> None:
    file = tmp_path / "servers.txt"
    file.write_text("http://a:1\r\n", encoding="utf-8-sig")
    assert read_server_file(file) == ["http://a:1"]


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "servers")
    with pytest.raises(ServerError, match="no regular file"):
        read_server_file(tmp_path / "servers")


@pytest.mark.parametrize("line", ["http://a:1 http://b:1", "http://\0:1", "http://a\x07b:1"])
def test_a_line_that_is_no_url_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "servers.txt"
    file.write_text(f"{line}\n")
    with pytest.raises(ServerError, match="has an entry that is no URL"):
        read_server_file(file)


def test_an_empty_name_of_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="is empty"):
        reader_of("")


def test_what_lasts_is_logged_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    engine = AsyncSGLang.connect(make().url)
    with caplog.at_level(logging.WARNING), engine.follow(lambda: ["http://127.0.0.1:1"], poll_s=100) as follower:
        for _ in range(3):
            follower._retry_at.clear()
            follower.look()
            deadline = time.monotonic() + 30
            while "can't be removed" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
    assert caplog.text.count("can't be removed") == 1
    assert caplog.text.count("can't be added") == 1
    engine.shutdown()
