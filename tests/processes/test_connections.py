"""Connections of a client: after a fork, when idle, when all are in use, and when this machine lacks something."""

from __future__ import annotations

import json
import os
import resource
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from urllib3.exceptions import MaxRetryError, NameResolutionError

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from torchrl_sglang import (
    AgentGateway,
    ClientConfig,
    RemoteGateway,
    SamplingParams,
    ServerTimeoutError,
    ServerUnreachableError,
)
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.http_errors import translate_error
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_ready
from torchrl_sglang.protocol.generate import build_generate, parse_generate

SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=4, ignore_eos=True)
NO_HOST = "http://no-such-host.invalid:30000"


def generate(client: SGLangClient, number: int) -> list[int]:
    (reply,) = parse_generate(client.send(build_generate([[1, 2, number]], SAMPLING)), num_expected=1, server="")
    return reply.output_ids


def in_child(work: Callable[[], object], timeout_s: float = 60) -> object:
    """What ``work`` returns in a forked child, as JSON carries it; an exception becomes its type and text."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result: object = work()
        except BaseException as error:  # noqa: BLE001  the parent reports it
            result = f"{type(error).__name__}: {error}"
        os.write(write_end, json.dumps(result).encode())
        os._exit(0)
    os.close(write_end)
    killer = threading.Timer(timeout_s, os.kill, (child, 9))
    killer.start()
    with os.fdopen(read_end, "rb") as pipe:
        written = pipe.read()
    killer.cancel()
    os.waitpid(child, 0)
    assert written, "the child was killed: it hung"
    return json.loads(written)


def test_a_forked_child_and_its_parent_get_their_own_replies(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as fake:
        right = [generate(SGLangClient(fake.url), number) for number in range(20)]
        assert right[0] != right[1]  # replies depend on the prompt
        client = SGLangClient(fake.url)
        generate(client, 0)  # leaves an idle connection, which a child must not use
        parent: list[list[int]] = []
        thread = threading.Thread(target=lambda: parent.extend(generate(client, number) for number in range(20)))

        def child() -> object:
            return [generate(client, number) for number in reversed(range(20))]

        with ThreadPoolExecutor() as threads:
            forked = threads.submit(in_child, child)
            thread.start()
            assert forked.result() == right[::-1]
        thread.join()
        assert parent == right


def test_a_forked_child_and_its_parent_get_the_remote_gateways_answers_to_their_own_calls(tiny_llama: Path) -> None:
    with (
        FakeServer(FakeSettings(model_path=tiny_llama)) as fake,
        AgentGateway(fake.url) as served,
        RemoteGateway(served.url) as gateway,
    ):
        mine, other = gateway.create_session().id, gateway.create_session().id
        with ThreadPoolExecutor(1) as pool:
            go = threading.Event()

            def ask(session: str) -> list[str]:
                return sorted({gateway.get(session).id for _ in range(400)})

            def ask_meanwhile() -> list[str]:
                go.wait()
                return ask(mine)

            waiting = pool.submit(ask_meanwhile)
            threading.Timer(0.05, go.set).start()
            assert in_child(lambda: ask(other)) == [other]
            assert waiting.result(timeout=60) == [mine]


def test_a_child_that_is_forked_while_the_parent_holds_the_pools_locks_generates(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as fake:
        pool = SGLangPool([SGLangClient(fake.url)])
        expected = [reply.output_ids for reply in pool.generate([[1, 2, 3]], SAMPLING)]
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with pool.update_lock:
                held.set()
                release.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()

        def child() -> object:
            with pool.update_lock:
                return [reply.output_ids for reply in pool.generate([[1, 2, 3]], SAMPLING)]

        assert in_child(child) == expected
        release.set()
        thread.join()


def test_a_request_that_finds_all_connections_in_use_waits_no_longer_than_its_time_out(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as fake:
        fake.arm(Fault(path="/generate", action="slow", seconds=3, times=1))
        client = SGLangClient(fake.url, ClientConfig(max_connections=1))
        thread = threading.Thread(target=generate, args=(client, 1))
        thread.start()
        while not any(event["path"] == "/generate" for event in fake.events):
            time.sleep(0.01)
        with pytest.raises(ServerTimeoutError, match="all 1 connections to .* in use for 0.5 s; the request was not"):
            client.send(build_generate([[1, 2, 3]], SAMPLING), timeout_s=0.5)
        thread.join()
        assert generate(client, 1)  # the place is free again


def test_a_stream_that_is_left_early_frees_its_connection(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as fake:
        client = SGLangClient(fake.url, ClientConfig(max_connections=1))
        for _ in range(3):
            stream = client.stream(build_generate([[1, 2, 3]], SAMPLING, stream=True))
            next(stream)
            stream.close()  # type: ignore[attr-defined]
        assert generate(client, 1)


class CountingHandler(socketserver.StreamRequestHandler):
    """Answers ``{}`` to every request; one to ``/hold`` waits until the test releases it."""

    def handle(self) -> None:
        server: CountingServer = self.server  # type: ignore[assignment]
        with server.lock:
            server.accepted += 1
        while line := self.rfile.readline():
            length = 0
            while (header := self.rfile.readline().strip().lower()) != b"":
                if header.startswith(b"content-length:"):
                    length = int(header.split(b":")[1])
            self.rfile.read(length)
            if b"/hold" in line:
                server.holding.release()
                server.released.wait(60)
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")


class CountingServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CountingHandler)
        self.lock, self.accepted = threading.Lock(), 0
        self.holding, self.released = threading.Semaphore(0), threading.Event()


@pytest.fixture
def counting_server() -> Iterator[CountingServer]:
    with CountingServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def test_a_connection_that_was_idle_for_long_is_not_used_again_while_another_one_is_busy(
    counting_server: CountingServer,
) -> None:
    from torchrl_sglang.protocol.messages import HttpRequest

    quick = HttpRequest(method="POST", path="/quick", body={}, timeout="generate")
    hold = HttpRequest(method="POST", path="/hold", body={}, timeout="generate")
    client = SGLangClient(f"http://127.0.0.1:{counting_server.server_address[1]}")
    with ThreadPoolExecutor() as threads:
        first = threads.submit(client.send, hold)
        counting_server.holding.acquire()
        client.send(quick)  # on a second connection, which is idle from now on
        assert counting_server.accepted == 2
        client.send(quick)
        assert counting_server.accepted == 2  # used again at once
        time.sleep(3.3)  # longer than a connection may be idle
        counting_server.released.set()
        first.result()  # the first connection is fresh
        counting_server.released.clear()
        busy = [threads.submit(client.send, hold) for _ in range(2)]
        for _ in busy:
            counting_server.holding.acquire()
        assert counting_server.accepted == 3
        counting_server.released.set()
        for future in busy:
            future.result()
    client.close()


def test_too_many_open_files_says_nothing_about_the_server(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as fake:

        def child() -> object:
            # The lowest free descriptor is below the limit's, so every one below it must be taken.
            used = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
            for _ in range(used):
                if os.dup(0) > used:
                    break
            resource.setrlimit(resource.RLIMIT_NOFILE, (used, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            try:
                SGLangClient(fake.url, ClientConfig(connect_retries=0)).connect()
            except ServerUnreachableError as error:
                return [error.is_local, str(error)]
            return "no error"

        is_local, message = in_child(child)  # type: ignore[misc]
        assert is_local
        assert "ulimit -n" in message


def test_a_host_name_that_cannot_be_resolved_is_named() -> None:
    with pytest.raises(ServerUnreachableError, match="no-such-host.invalid' is unknown.*Check its spelling"):
        SGLangClient(NO_HOST, ClientConfig(connect_retries=0)).connect()


@pytest.mark.parametrize(("code", "is_local"), [(socket.EAI_AGAIN, True), (socket.EAI_NONAME, False)])
def test_a_failed_look_up_says_nothing_about_the_server_but_a_name_that_is_gone_does(code: int, is_local: bool) -> None:
    looked_up = NameResolutionError("host", None, socket.gaierror(code, ""))  # type: ignore[arg-type]
    looked_up.__cause__ = socket.gaierror(code, "")
    failed = requests.ConnectionError(MaxRetryError(None, "", looked_up))  # type: ignore[arg-type]
    error = translate_error(failed, build_ready(), url="http://host:30000", wait_s=1)
    assert isinstance(error, ServerUnreachableError)
    assert error.is_local is is_local


def test_a_server_that_refuses_connections_is_no_local_error() -> None:
    with pytest.raises(ServerUnreachableError) as caught:
        SGLangClient("http://127.0.0.1:1", ClientConfig(connect_retries=0)).connect()
    assert not caught.value.is_local
