"""Ports: those that are picked are free and reserved once, across threads and processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchrl_sglang.server.ports import is_bindable, listens_on, reserve_port


def test_many_starts_at_the_same_moment_get_different_ports() -> None:
    with ThreadPoolExecutor(16) as threads:
        reservations = list(threads.map(lambda _: reserve_port("127.0.0.1"), range(64)))
    ports = {reservation.port for reservation in reservations if reservation is not None}
    assert len(ports) == 64
    assert all(20000 <= port <= 29999 for port in ports)
    for reservation in reservations:
        assert reservation is not None
        reservation.close()


def test_a_port_reserved_in_another_process_is_refused_until_that_process_ends() -> None:
    script = (
        "from torchrl_sglang.server.ports import reserve_port; r = reserve_port('127.0.0.1'); "
        "print(r.port, flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout is not None
        port = int(other.stdout.readline())
        assert reserve_port("127.0.0.1", port) is None
        other.kill()
        other.wait(10)
    reservation = reserve_port("127.0.0.1", port)
    assert reservation is not None
    reservation.close()


@pytest.mark.parametrize("listener", ["127.0.0.1", "0.0.0.0"])
def test_a_port_on_which_a_program_listens_is_refused(listener: str) -> None:
    with socket.socket() as busy:
        busy.bind((listener, 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert not is_bindable("127.0.0.1", port)
        assert reserve_port("127.0.0.1", port) is None
    assert is_bindable("127.0.0.1", port)


def test_the_listener_is_found_by_its_process() -> None:
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        ours.listen()
        port = ours.getsockname()[1]
        assert listens_on(os.getppid(), port)  # this process is a descendant of its parent
        other = subprocess.Popen(["sleep", "60"])
        assert not listens_on(other.pid, port)
        other.kill()
        other.wait(10)


def test_a_host_of_another_machine_has_no_free_port() -> None:
    assert reserve_port("192.0.2.1", 31150) is None
