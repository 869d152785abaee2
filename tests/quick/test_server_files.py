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
from torchrl_sglang.cli.main import main
from torchrl_sglang.pool.server_list import read_server_file, reader_of, write_server_file

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


def test_links_to_the_file_and_its_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("http://a:1\n")
    real.chmod(0o664)
    link.symlink_to(real)
    write_server_file(link, ["http://b:1"])
    assert link.is_symlink()
    assert real.read_text() == "http://b:1\n"
    assert real.stat().st_mode & 0o777 == 0o664
    assert sorted(tmp_path.iterdir()) == [link, real]


def test_no_change_by_the_command_line_is_lost(make: Make, tmp_path: Path) -> None:
    servers = [make().url for _ in range(6)]
    file = tmp_path / "servers.txt"
    file.write_text(f"{servers[0]}\n")
    commands = [threading.Thread(target=main, args=(["servers", str(file), "--add", url],)) for url in servers[1:]]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    assert sorted(read_server_file(file)) == sorted(servers)
    assert list(tmp_path.iterdir()) == [file]


def test_the_command_line_refuses_a_second_name_and_shows_an_empty_list(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = make().url
    file = tmp_path / "servers.txt"
    file.write_text("")
    assert main(["servers", str(file)]) == 0
    assert "names no server" in capsys.readouterr().out
    file.write_text(f"{url}\n")
    assert main(["servers", str(file), "--add", url.replace("127.0.0.1", "localhost")]) == 2
    assert "under the name" in capsys.readouterr().err
    assert read_server_file(file) == [url]
