"""``torchrl-sglang gateway`` serves until it is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang.cli.main import main


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_it_prints_ready_serves_and_ends_with_sigterm(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, port, made = tmp_path / "key", free_port(), {}
    key.write_text("secret\n")

    def use() -> None:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        try:
            while not made and time.monotonic() < deadline:
                try:
                    made["refused"] = httpx.post(f"{url}/sessions", trust_env=False).status_code
                    headers = {"authorization": "Bearer secret"}
                    made["session"] = httpx.post(f"{url}/sessions", headers=headers, trust_env=False).json()
                except httpx.ConnectError:
                    time.sleep(0.05)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    user = threading.Thread(target=use)
    user.start()
    words = ["gateway", "--url", fake.url, "--port", str(port), "--admin-key-file", str(key), "--temperature", "0.7"]
    assert main(words) == 0
    user.join()
    assert capsys.readouterr().out.startswith(f"ready http://127.0.0.1:{port}\n")
    assert made["refused"] == 401
    assert made["session"]["base_url"].startswith(f"http://127.0.0.1:{port}/sessions/")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host", "0.0.0.0"], "give an admin_key"),
        (["--admin-key-file", "/no/such/file"], "can't be read"),
        (["--temperature", "-1"], "temperature must be"),
        (["--session-timeout", "0"], "session_timeout_s must be"),
        (["--max-sessions", "0"], "max_sessions must be"),
        (["--override", "temperature=-1"], "temperature must be"),
        (["--override", "colour=red"], "colour"),
    ],
)
def test_a_wrong_call_ends_with_a_message(
    fake: FakeServer, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gateway", "--url", fake.url, "--port", "0", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    url: Any = f"http://127.0.0.1:{free_port()}"
    assert main(["gateway", "--url", url, "--port", "0"]) == 1
    assert url in capsys.readouterr().err
