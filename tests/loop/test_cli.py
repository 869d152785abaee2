"""The commands of the command line, each in its own process, with real servers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang.chat import SGLangChat
from torchrl_sglang.engine import AsyncSGLang
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.server.ports import reserve_port
from torchrl_sglang.server.supervisor import process_table, tree_pids

PROMPT = "The capital of France is"
COMMAND = [sys.executable, "-m", "torchrl_sglang"]


def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *words], input=stdin, capture_output=True, text=True, timeout=200, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_generate_prints_what_the_engine_gives(server: SGLangServer) -> None:
    with AsyncSGLang.connect(server.url) as engine:
        expected = [
            engine.generate(prompt, temperature=0, max_new_tokens=8).text for prompt in (PROMPT, "Hello world!")
        ]
    options = ["--url", server.url, "--temperature", "0", "--max-new-tokens", "8"]
    done = run("generate", PROMPT, "Hello world!", *options)
    assert (done.returncode, done.stdout) == (0, "".join(f"{text}\n" for text in expected))
    rows = run("generate", "--json", *options, stdin=f"{PROMPT}\n\nHello world!\n").stdout.split("\n")[:-1]
    assert [json.loads(row)["text"] for row in rows] == expected
    assert json.loads(rows[0])["response_length"] == 8
    chat = SGLangChat(server.url).chat(PROMPT, temperature=0, max_new_tokens=8)[0].text
    assert run("generate", "--chat", PROMPT, *options).stdout == f"{chat}\n"
    refused = run("generate", PROMPT, *options, "--seed", "1", "--chat", "--temperature", "1")
    assert refused.returncode == 2
    assert "deterministic" in refused.stderr


def test_chat_remembers_forgets_and_leaves(server: SGLangServer) -> None:
    chat = SGLangChat(server.url, temperature=0, max_new_tokens=8)
    first = chat.chat("a", system="s")[0]
    talk = [{"role": "user", "content": "a"}, first.message, {"role": "user", "content": "b"}]
    second = chat.chat(talk, system="s")[0]
    alone = chat.chat("b", system="s")[0]
    assert second.text != alone.text
    lines = "a\nb\n/nonsense\n/image\n/image no-such.png\n\n/reset\nb\n/exit\nnever read\n"
    words = ["--url", server.url, "--temperature", "0", "--max-new-tokens", "8", "--system", "s"]
    done = run("chat", *words, stdin=lines)
    assert done.returncode == 0
    assert done.stdout == f"{first.text}\n{second.text}\n{alone.text}\n"
    messages = ("unknown command /nonsense", "the path is missing", "'no-such.png' can't be read", "deleted")
    for message in (*messages, server.url):
        assert message in done.stderr


def test_ctrl_c_cuts_an_answer_short_and_the_chat_goes_on(tiny_llama: Path) -> None:
    """Runs in a pseudo-terminal; the fake server is slow enough to be interrupted."""
    terminal, other_end = pty.openpty()
    with FakeServer(FakeSettings(model_path=tiny_llama, step_s=0.2)) as fake:
        words = ["chat", "--url", fake.url, "--temperature", "1"]
        process = subprocess.Popen(
            [*COMMAND, *words], stdin=other_end, stdout=other_end, stderr=other_end, start_new_session=True
        )
        os.close(other_end)
        try:
            read_until(terminal, b"> ")
            for _ in range(60):  # no answer to interrupt: a new prompt; a readline that does not wait yet misses it
                process.send_signal(signal.SIGINT)
                if select.select([terminal], [], [], 0.5)[0]:
                    break
            read_until(terminal, b"> ")
            for _ in range(5):  # one token in 320 ends an answer, so the first try may come too late
                os.write(terminal, b"go on\n")
                read_until(terminal, b"go on\r\n", more=1)
                process.send_signal(signal.SIGINT)
                if b"[interrupted]" in read_until(terminal, b"\r\n> "):
                    break
            else:
                pytest.fail("no answer was interrupted")
            os.write(terminal, b"/exit\n")
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            process.wait()
            os.close(terminal)


def read_until(terminal: int, mark: bytes, *, more: int = 0, timeout_s: float = 90) -> bytes:
    """The terminal's output up to ``mark`` and ``more`` bytes after it."""
    seen, deadline = b"", time.monotonic() + timeout_s
    while mark not in seen or len(seen) < seen.index(mark) + len(mark) + more:
        left = deadline - time.monotonic()
        assert left > 0, seen
        if select.select([terminal], [], [], left)[0]:
            with contextlib.suppress(OSError):
                seen += os.read(terminal, 4096)
    return seen


@pytest.mark.slow
@pytest.mark.usefixtures("needs_sglang")
@pytest.mark.timeout(400)
def test_serve_serves_until_ctrl_c_and_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    reserved = reserve_port("127.0.0.1")
    assert reserved is not None
    port = reserved.port
    reserved.close()
    key_file = tmp_path / "key"
    key_file.write_text("open-sesame\n")
    words = ["serve", str(tiny_llama), "--device", "cpu", "--port", str(port), "--api-key-file", str(key_file)]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"ready http://127.0.0.1:{port}\n", log.read_text()
        pids = tree_pids(process.pid)
        assert len(pids) > 3
        done = run("generate", PROMPT, "--url", f"127.0.0.1:{port}", "--max-new-tokens", "2")
        assert done.returncode == 1
        assert "401" in done.stderr
        assert "open-sesame" not in done.stderr
        options = ["--url", f"127.0.0.1:{port}", "--api-key-file", str(key_file), "--max-new-tokens", "2"]
        assert run("generate", PROMPT, *options).returncode == 0
        assert run("serve", str(tiny_llama), "--device", "cpu", "--port", str(port)).returncode == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    shown = log.read_text()
    assert "POST /generate" in shown, "the server's log is shown"
    assert "open-sesame" not in shown
    assert "Traceback" not in shown.split("ready to roll")[-1]
    deadline = time.monotonic() + 30
    while (left := set(pids) & process_table().keys()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/ready", timeout=5)
