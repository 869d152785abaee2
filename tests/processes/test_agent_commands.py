"""Agents that are command lines: what they are given, how their reward is read, and that no process is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import AgentCollector, AgentGateway, ConfigError
from torchrl_sglang.agents.collector.commands import CommandAgent
from torchrl_sglang.agents.collector.failures import RunFailedError
from torchrl_sglang.agents.collector.rewards import NoReward, Reward

URL, KEY = "http://127.0.0.1:1/sessions/s/v1", "sk-of-a-session"
DEADLINE_S = 60.0


def run(command: Any, task: Any = "a task") -> Reward | NoReward:
    async def once() -> Reward | NoReward:
        return await CommandAgent([command] if isinstance(command, Path) else command)(task, URL, KEY)

    return asyncio.run(once())


def program(code: str, *words: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, *words]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_pids(path: Path, count: int) -> list[int]:
    """The process ids in a file, as soon as it has so many."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        pids = path.read_text().split() if path.exists() else []
        if len(pids) >= count:
            return [int(pid) for pid in pids]
        time.sleep(0.02)
    raise AssertionError(f"{path} has no {count} process ids")


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"some of {pids} are still alive"
        time.sleep(0.02)


# A child in a session of its own, which ignores SIGTERM and SIGHUP, and a grandchild of it.
LEAVES_CHILDREN = """
import os, signal, sys, time
path = sys.argv[1]
def note():
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{os.getpid()}\\n".encode())
note()
if os.fork() == 0:
    os.setsid()
    for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    os.fork()
    note()
    time.sleep(600)
while len(open(path).read().split()) < 3:
    time.sleep(0.01)
"""


def test_the_fields_are_replaced_without_a_shell_and_once(tmp_path: Path) -> None:
    says_all = "import os, sys; print(sys.argv[1:], os.environ['OPENAI_BASE_URL'], os.environ['OPENAI_API_KEY'])"
    task = 'it\'s $(rm -rf x); `y` "{api_key}" {base_url} *\nünï'
    path = tmp_path / "said"
    code = f"import sys; sys.stdout = open({str(path)!r}, 'w', encoding='utf8'); {says_all}"
    given = program(code, "--url={base_url}", "{api_key}", "{task}", "{other}")
    assert run(given, task) == NoReward(hint="; it printed nothing")
    assert path.read_text(encoding="utf8") == f"{[f'--url={URL}', KEY, task, '{other}']} {URL} {KEY}\n"


def test_a_task_that_is_no_string_is_written_as_json() -> None:
    reward = run(program("import json, sys; print(json.loads(sys.argv[1])['a'][1])", "{task}"), {"a": [1, 2.5]})
    assert reward == Reward(value=2.5)


def test_a_command_line_is_split_as_a_shell_would() -> None:
    assert run("python3 -I -S -c 'print(\"said\"); print(0.25)'") == Reward(value=0.25)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (
            "import sys; sys.stderr.write('no model\\n' + sys.argv[1]); sys.exit(3)",
            "error",
            r"code 3: no model\n\*\*\*",
        ),
        ("import os; os.kill(os.getpid(), 9)", "error", "ended by signal SIGKILL: it wrote no error"),
        ("print('nan')", "bad reward", "a finite number, got nan"),
        ("print('{\"reward\": null}')", "bad reward", "got None"),
    ],
)
def test_a_program_that_fails_is_a_failed_run(code: str, kind: str, message: str) -> None:
    with pytest.raises(RunFailedError, match=message) as error:
        run(program(code, "{api_key}"))
    assert error.value.kind == kind


@pytest.mark.parametrize(
    ("task", "message"), [("a\0b", "NUL character"), ("x" * (1 << 17), "128 KiB"), ({"a": "ü" * (1 << 17)}, "128 KiB")]
)
def test_a_task_that_no_argument_can_hold_is_a_failed_run(task: Any, message: str) -> None:
    with pytest.raises(RunFailedError, match=message):
        run(program("print(1)", "{task}"), task)


def test_a_program_that_writes_much_does_not_wait_for_its_reader() -> None:
    each = "sys.stdout.write('x' * 10000 + '\\n'); sys.stderr.write('y' * 10000)"
    code = f"import sys\nfor _ in range(400): {each}\nprint(7)"
    assert run(program(code)) == Reward(value=7.0)


def test_a_program_gets_no_input_beside_its_task_and_may_close_its_output() -> None:
    assert run(program("import sys; print(len(sys.stdin.read()))", "{task}")) == Reward(value=0.0)
    assert run(program("import os, time; os.close(1); os.close(2); time.sleep(0.3)")) == NoReward(
        hint="; it printed nothing"
    )


def test_a_command_without_the_task_reads_it_from_its_input_of_any_length() -> None:
    code = "import json, sys; task = json.load(sys.stdin); print(task['n'] + len(task['text']))"
    assert run(program(code), {"n": 0.5, "text": "ü\0" * 150_000}) == Reward(value=300_000.5)
    assert run(program("import sys; print(len(sys.stdin.read()))"), "four") == Reward(value=4.0)


def test_a_program_without_a_reward_says_what_it_printed_last() -> None:
    found = run(program("import sys; print('a'); print('reward:', sys.argv[1])", "{api_key}"))
    assert found == NoReward(hint="; the last line that it printed is 'reward: ***'")


def test_a_script_that_can_not_be_started_says_what_may_be_wrong(tmp_path: Path) -> None:
    for name, text, message in (
        ("plain", "echo 1\n", "Exec format error: is it a script without a first line"),
        ("windows", "#!/bin/sh\r\necho 1\r\n", "ends as on Windows"),
    ):
        script = tmp_path / name
        script.write_bytes(text.encode())
        script.chmod(0o755)
        with pytest.raises(RunFailedError, match=message):
            run(script)


def test_a_task_that_is_no_json_is_a_failed_run() -> None:
    for task, message in (({"f": print}, "can't be written as JSON"), ("\ud800", "half of a surrogate pair")):
        with pytest.raises(RunFailedError, match=message):
            run(program("print(1)"), task)


def test_what_a_program_leaves_behind_is_killed_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    assert run(program(LEAVES_CHILDREN + "print(1)", str(path))) == Reward(value=1.0)
    assert not any(map(is_alive, read_pids(path, 3)))


def test_a_cancelled_run_leaves_no_process(tmp_path: Path) -> None:
    path = tmp_path / "pids"

    async def cancel() -> None:
        running = asyncio.ensure_future(
            CommandAgent(program(LEAVES_CHILDREN + "time.sleep(600)", str(path)))("", URL, KEY)
        )
        await asyncio.to_thread(read_pids, path, 3)
        running.cancel()
        await asyncio.wait({running})

    asyncio.run(cancel())
    assert not any(map(is_alive, read_pids(path, 3)))


TRAINER = """
import asyncio, sys
from torchrl_sglang.agents.collector.commands import CommandAgent
async def main():
    await CommandAgent([sys.executable, "-I", "-S", "-c", sys.argv[1], sys.argv[2]])("", "http://x/v1", "key")
asyncio.run(main())
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGTERM, signal.SIGINT))]
)
def test_a_trainer_that_dies_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "pids"
    words = [sys.executable, "-c", TRAINER, LEAVES_CHILDREN + "time.sleep(600)", str(path)]
    with (tmp_path / "errors").open("w") as errors:
        trainer = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stderr=errors)
    pids = read_pids(path, 3)
    trainer.send_signal(number)
    trainer.wait(DEADLINE_S)
    wait_until_gone(pids)


def wait_for_batch(collector: AgentCollector) -> None:
    with pytest.raises(ConfigError, match="shut down"):
        next(iter(collector))


def test_the_collector_runs_a_command_and_kills_it_when_its_time_is_over(tmp_path: Path, tiny_llama: Path) -> None:
    asks = """
import json, os, sys, urllib.request
def post(url, body):
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)).read()
base = os.environ["OPENAI_BASE_URL"]
messages = [{"role": "user", "content": sys.argv[1]}]
post(base + "/chat/completions", {"model": "m", "max_tokens": 4, "messages": messages})
number = os.getpid()
if sys.argv[1] == "posts":
    post(base.removesuffix("/v1") + "/reward", {"reward": number, "info": {"how": "posted"}})
    number = "the answer is 7"
"""
    path = tmp_path / "pids"
    command = program(
        asks + f"if sys.argv[1] == 'hangs':\n  sys.argv[1] = {str(path)!r}\n  exec({LEAVES_CHILDREN!r})\n"
        "  time.sleep(600)\nprint(number)",
        "{task}",
    )
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server, AgentGateway(server.url) as gateway:
        with AgentCollector(gateway, command, ["prints", "posts"], group_size=2) as collector:
            (batch,) = collector
        assert list(batch["query"]) == ["prints"] * 2 + ["posts"] * 2
        assert [info.get("how") for info in batch["info"]] == [None, None, "posted", "posted"]
        with AgentCollector(
            gateway, command, ["hangs"] * 9, group_size=2, groups_per_batch=1, timeout_s=600
        ) as collector:
            waiting = threading.Thread(target=wait_for_batch, args=(collector,))
            waiting.start()
            pids = read_pids(path, 6)
            collector.shutdown()
            waiting.join(DEADLINE_S)
            assert not any(map(is_alive, pids)), "shutdown left processes"
        with AgentCollector(
            gateway, command, ["hangs", "prints"], group_size=2, timeout_s=8, concurrency=2
        ) as collector:
            (batch,) = collector
            assert collector.stats()["failed_runs_timeout"] >= 1
        assert set(batch["query"]) == {"prints"}
        assert not any(map(is_alive, read_pids(path, 9)))
