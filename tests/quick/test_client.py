"""Which requests a client retries, and which it never sends twice."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from torchrl_sglang import AsyncSGLang, ClientConfig, ConfigError, ServerLostError, ServerTimeoutError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.engine.launching import server_configs
from torchrl_sglang.errors import ServerUnreachableError
from torchrl_sglang.http_errors import may_retry
from torchrl_sglang.protocol.control import build_flush, build_ready
from torchrl_sglang.protocol.generate import build_generate

GENERATE = build_generate([[3, 4]], SamplingParams(max_new_tokens=2))


def times_received(fake: FakeServer, path: str) -> int:
    return sum(event["path"] == path for event in fake.events)


@pytest.mark.parametrize(
    ("request_", "error", "retried"),
    [
        (GENERATE, ServerUnreachableError(""), True),  # it never arrived
        (GENERATE, ServerLostError(""), False),  # it may have run
        (GENERATE, ServerTimeoutError(""), False),  # it may be running
        (build_flush(), ServerLostError(""), False),
        (build_ready(), ServerLostError(""), True),  # it only reads
        (build_ready(), ServerTimeoutError(""), False),  # the server is overloaded: a second request makes it worse
    ],
)
def test_only_what_cannot_have_run_or_only_reads_is_sent_again(request_, error, retried: bool) -> None:  # type: ignore[no-untyped-def]
    assert may_retry(request_, error) is retried


def test_a_request_without_a_reply_is_retried_only_if_it_changes_nothing(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as fake:
        client = SGLangClient(fake.url)
        fake.arm(Fault(path="/ready", action="drop", at="handled"))
        client.send(build_ready())
        assert times_received(fake, "/ready") == 2
        fake.arm(Fault(path="/generate", action="drop", at="handled"))
        with pytest.raises(ServerLostError, match="it may have run, so it is not sent again"):
            client.send(GENERATE)
        assert times_received(fake, "/generate") == 1
        client.close()


def test_control_calls_get_through_when_generation_holds_every_connection(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as fake:
        fake.arm(Fault(path="/generate", action="slow", seconds=3, times=0))
        client = SGLangClient(fake.url, ClientConfig(max_connections=2))
        threads = [threading.Thread(target=client.send, args=(GENERATE,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        while times_received(fake, "/generate") < 2:
            time.sleep(0.01)
        client.send(build_ready())
        assert all(thread.is_alive() for thread in threads), "generation was over: a connection was free"
        for thread in threads:
            thread.join(timeout=60)
        client.close()


def test_a_server_that_opens_its_port_a_moment_later_is_reached(tiny_llama: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    fake = FakeServer(FakeSettings(model_path=tiny_llama, port=port))
    opening = threading.Timer(0.3, fake.start)
    opening.start()
    try:
        SGLangClient(f"127.0.0.1:{port}", ClientConfig(connect_retries=6)).send(build_ready())
    finally:
        opening.join()
        fake.stop()


def test_retries_can_be_switched_off_and_are_limited() -> None:
    start = time.monotonic()
    for retries in (0, 2):
        with pytest.raises(ServerUnreachableError):
            SGLangClient("http://127.0.0.1:9", ClientConfig(connect_retries=retries)).send(GENERATE)
    assert time.monotonic() - start < 30


def test_the_names_of_other_ecosystems_launch_the_same_servers() -> None:
    given = {"max_model_len": 512, "gpu_memory_utilization": 0.5, "tensor_parallel_size": 1, "num_replicas": 2}
    first, second = server_configs("m", tp_size=1, dp_size=1, gpus=None, given={**given, "device": "cpu"})
    assert (first.context_length, first.mem_fraction_static, first.tp_size) == (512, 0.5, 1)
    assert second.context_length == 512
    with pytest.raises(ConfigError, match="max_model_len=256 means context_length, which is also given as 512"):
        server_configs("m", tp_size=1, dp_size=1, gpus=None, given={"context_length": 512, "max_model_len": 256})
    with pytest.raises(ConfigError, match="dp_size, the number of servers, must be at least 1, got 0"):
        AsyncSGLang.from_pretrained("m", dp_size=0)
    with pytest.raises(ConfigError, match="unknown argument 'max_modl_len'. Did you mean 'max_model_len'"):
        AsyncSGLang.from_pretrained("m", max_modl_len=1)
