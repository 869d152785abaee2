"""A pool whose members follow a list: a file, a DNS name, a function; and a command line that edits the file."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeServer
from tests.quick.pools import SHORT, pool_of
from torchrl_sglang import AsyncSGLang, ConfigError, SamplingParams, ServerError
from torchrl_sglang.cli import main
from torchrl_sglang.pool import ServerListFollower, SGLangPool
from torchrl_sglang.pool.server_list import read_server_file, reader_of, write_server_file

Make = Callable[..., FakeServer]


def urls(pool: SGLangPool) -> list[str]:
    return [client.url for client in pool.clients]


def wait_for(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_names_the_servers(make: Make, tmp_path: Path) -> None:
    first, second, third = make(), make(), make()
    file = tmp_path / "servers.txt"
    file.write_text(f"# of this week\n\n{first.url}\n")
    engine = AsyncSGLang.connect(first.url)
    with engine.follow(file, poll_s=0.02):
        write_server_file(file, [first.url, second.url, third.url])
        wait_for(lambda: urls(engine.pool) == [first.url, second.url, third.url])
        file.write_text(f"{third.url}   # the others are being replaced\n")
        wait_for(lambda: urls(engine.pool) == [third.url])
        file.unlink()
        time.sleep(0.1)
        assert urls(engine.pool) == [third.url]
    assert engine.pool.generate([[1, 2]], SHORT)[0].server == third.url


def test_shutdown_ends_the_thread_and_so_does_a_pool_that_nobody_uses(make: Make, tmp_path: Path) -> None:
    engine = AsyncSGLang.connect(make().url)
    follower = engine.follow(lambda: urls(engine.pool), poll_s=0.02)
    engine.shutdown()
    assert not follower._thread.is_alive()
    pool = pool_of(make())
    listed = urls(pool)
    follower = ServerListFollower(pool, lambda: listed, poll_s=0.02)
    thread = follower._thread
    del pool
    gc.collect()
    wait_for(lambda: not thread.is_alive())


def test_a_server_that_can_not_be_added_is_named_in_the_log_and_the_others_are_added(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    with ServerListFollower(pool, lambda: [first.url, "http://127.0.0.1:9", second.url], poll_s=0.02):
        wait_for(lambda: urls(pool) == [first.url, second.url])
        time.sleep(0.1)
    complaints = [record.message for record in caplog.records if "127.0.0.1:9 is on the list" in record.message]
    assert len(complaints) == 1, "tried again only after some time"


@pytest.mark.parametrize("broken", ["empty", "raises", "no url", "a string"])
def test_a_list_that_is_broken_changes_nothing(make: Make, broken: str) -> None:
    first, second = make(), make()
    pool = pool_of(first, second)

    def listed() -> Any:
        if broken == "raises":
            raise ZeroDivisionError
        return {"empty": [], "no url": ["Qwen/Qwen3-0.6B"], "a string": first.url}[broken]

    follower = ServerListFollower(pool, lambda: [first.url, second.url], poll_s=1000)
    follower._read = reader_of(listed)
    with pytest.raises(ServerError, match="list"):
        follower.look()
    assert urls(pool) == [first.url, second.url]
    follower.stop()


def test_a_server_that_is_missing_for_a_moment_stays(make: Make) -> None:
    first, second = make(), make()
    pool = pool_of(first, second)
    listed = [first.url]
    with ServerListFollower(pool, lambda: listed, poll_s=0.02, grace_s=0.4):
        time.sleep(0.1)
        listed.append(second.url)
        time.sleep(0.1)
        listed.remove(second.url)
        time.sleep(0.2)
        assert urls(pool) == [first.url, second.url]
        wait_for(lambda: urls(pool) == [first.url])


def test_new_servers_join_while_another_one_finishes_its_requests(make: Make) -> None:
    first, second, third = make(), make(step_s=0.02), make()
    pool = pool_of(first, second)
    listed = [first.url, second.url]
    long = SamplingParams(max_new_tokens=100, temperature=0, ignore_eos=True)
    thread = threading.Thread(target=lambda: pool.generate([[index, 5] for index in range(8)], long))
    thread.start()
    with ServerListFollower(pool, lambda: listed, poll_s=0.02):
        wait_for(lambda: any(event["path"] == "/generate" for event in second.events))
        listed[1] = third.url
        wait_for(lambda: third.url in urls(pool))
        assert second.url in urls(pool)
        wait_for(lambda: urls(pool) == [first.url, third.url])
    thread.join()


def test_a_name_stands_for_the_servers_at_its_addresses(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "servers.example"
        return [(0, 0, 0, "", ("10.0.0.2", port)), (0, 0, 0, "", ("10.0.0.1", port)), (0, 0, 0, "", ("fd00::1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert reader_of("dns://servers.example:30000")() == [
        "http://10.0.0.1:30000",
        "http://10.0.0.2:30000",
    ]
    monkeypatch.undo()
    with pytest.raises(ServerError, match="can't be resolved"):
        reader_of("dns://no-such-name.invalid:30000")()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("dns://servers", "no DNS name with a port"),
        ("dns://servers:99999", "no DNS name with a port"),
        ("http://a:30000", "is one server, not a list"),
        (5, "a list of servers is a file"),
    ],
)
def test_what_is_no_list_is_refused_at_once(make: Make, source: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AsyncSGLang.connect(make().url).follow(source)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "servers.txt"
    write_server_file(file, ["http://a:1", "http://b:2"])
    assert read_server_file(file) == ["http://a:1", "http://b:2"]
    assert [each.name for each in tmp_path.iterdir()] == ["servers.txt"]
    with pytest.raises(OSError, match="can't be written"):
        write_server_file(tmp_path / "missing" / "servers.txt", [])


def test_the_command_line_edits_the_file_that_a_trainer_follows(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make(), make(weight_version="4@abcd")
    file = tmp_path / "servers.txt"
    assert main(["servers", str(file)]) == 1
    assert "can't be read" in capsys.readouterr().err
    assert main(["servers", str(file), "--add", first.url]) == 0
    assert main(["servers", str(file), "--add", second.url.removeprefix("http://")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{second.url}  {second.settings.model_path}  weights 4@abcd  0 requests"
    assert read_server_file(file) == [first.url, second.url]
    pool = pool_of(first)
    with ServerListFollower(pool, file, poll_s=0.02):
        wait_for(lambda: urls(pool) == [first.url, second.url])
        assert main(["servers", str(file), "--remove", second.url]) == 0
        wait_for(lambda: urls(pool) == [first.url])
    capsys.readouterr()
    for words, code, message in (
        (["--add", first.url], 2, "is on the list already"),
        (["--add", "http://127.0.0.1:9"], 1, "nothing accepts connections"),
        (["--remove", second.url], 2, "is not on the list"),
        (["--remove", first.url], 2, "no server would be left"),
        (["--add", "Qwen/Qwen3-0.6B"], 2, "looks like the name"),
    ):
        assert main(["servers", str(file), *words]) == code
        assert message in capsys.readouterr().err
    assert read_server_file(file) == [first.url]
    first.stop()
    assert main(["servers", str(file)]) == 0
    assert f"{first.url}  does not answer" in capsys.readouterr().out


def test_a_host_that_can_be_no_name_is_an_error_of_this_package(make: Make) -> None:
    """Python raises ``UnicodeError`` for a part of a name that is empty or too long."""
    pool = pool_of(make())
    for url in (f"http://{'a' * 70}:30000", "http://a..b:30000"):
        with pytest.raises(ConfigError, match="is not the URL of a server"):
            pool.add(url)
    with pytest.raises(ServerError, match="can't be resolved"):
        reader_of("dns://a..b:30000")()


def test_no_error_ends_the_following(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make(), make()
    pool = pool_of(first)
    look, failures = ServerListFollower.look, iter([RuntimeError("can't start new thread"), OSError(24, "too many")])

    def fail_first(self: ServerListFollower) -> None:
        for failure in failures:
            raise failure
        look(self)

    monkeypatch.setattr(ServerListFollower, "look", fail_first)
    with ServerListFollower(pool, lambda: [first.url, second.url], poll_s=0.02):
        wait_for(lambda: urls(pool) == [first.url, second.url])
