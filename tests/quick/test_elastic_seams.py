"""Members that change in several threads: launched servers and a list that is followed; the file that copies read."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang import AsyncSGLang
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.parallel import Task
from torchrl_sglang.pool import ServerListFollower, SGLangPool
from torchrl_sglang.pool.member_file import MemberFile


class Process:
    has_crashed = False

    def __init__(self, fake: FakeServer) -> None:
        self.url = fake.url
        self.stopped = False

    def stop(self, kill: bool = False) -> None:
        self.stopped = True


def test_a_list_that_is_followed_leaves_servers_alone_that_are_just_being_launched(
    make: Callable[..., FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Launcher:
        def start(self, num_servers: int, running: Any, *, gpus: Any, progress: Any) -> list[Process]:
            return [Process(make()) for _ in range(num_servers)]

    attached = make()
    listed = tmp_path / "servers"
    listed.write_text(attached.url)
    pool = SGLangPool([SGLangClient(attached.url)])
    pool.connect()
    removed: list[str] = []
    monkeypatch.setattr(ServerListFollower, "_remove", lambda self, pool, url: removed.append(url))
    with AsyncSGLang(pool, launcher=Launcher()) as engine:  # type: ignore[arg-type]
        follower = engine.follow(listed, poll_s=1000)
        add = pool.add

        def slow(urls: str | Sequence[str]) -> tuple[str, ...]:
            added = add(urls)
            follower.look()  # while the newcomer gets its weights
            return added

        monkeypatch.setattr(pool, "add", slow)
        (new,) = engine.add(1)
        follower.look()
        for thread in threading.enumerate():
            if thread.name == "sglang-remove":
                thread.join()
        assert removed == []
        assert [client.url for client in pool.clients] == [attached.url, new]


def test_the_file_of_copies_is_written_by_one_thread_at_a_time(make: Callable[..., FakeServer]) -> None:
    """Two that write at once would use one temporary file, and the older list could be the last one written."""
    pool = SGLangPool([SGLangClient(make().url)])
    pool.connect()
    membership: Any = pool._membership
    write, under_way, goes_on = membership._file.write, threading.Event(), threading.Event()
    most: list[int] = []
    active: list[int] = []

    def slow(*members: Any) -> None:
        active.append(1)
        most.append(len(active))
        under_way.set()
        goes_on.wait(0.3)
        write(*members)
        active.pop()

    membership._file.write = slow
    first = Task(membership.publish, name="first")
    assert under_way.wait(30)
    second = Task(membership.publish, name="second")
    assert first.wait(30)
    assert second.wait(30)
    assert max(most) == 1


def test_a_full_disk_leaves_the_old_file_of_copies_and_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = MemberFile(tmp_path / "members.json")
    file.write({"http://a:1": None})
    written = os.write

    def full(descriptor: int, content: bytes) -> int:
        if len(content) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(descriptor, content[: len(content) // 2])

    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            file.write({"http://a:1": None, "http://b:1": None})
    assert MemberFile(file.path).read_if_new() == {"http://a:1": None}
    assert list(tmp_path.iterdir()) == [file.path]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    file.delete()


def test_a_pipe_among_the_files_of_copies_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "torchrl-sglang-members-x.json")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    MemberFile().write({"http://a:1": None})
