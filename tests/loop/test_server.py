"""Real SGLang servers as child processes: several in parallel, errors with their causes, and no process left behind.

A start takes about 20 s, so each serves several assertions. Tests that need no SGLang are in
``tests/processes/test_server_life.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.processes.process_trees import tree, wait_gone
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ServerError, ServerStartError
from torchrl_sglang.server import SGLangServer, replicate, start_fleet, stop_fleet
from torchrl_sglang.server.supervisor import process_table

KEY = "correct-horse-battery"
pytestmark = [pytest.mark.usefixtures("needs_sglang", "logs_go_with_the_test"), pytest.mark.timeout(400)]
REQUEST = {"input_ids": [[1, 5, 6], [1, 7]], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
DEADLY = {"input_ids": [10**6], "sampling_params": {"max_new_tokens": 1}}


def generate(server: SGLangServer, key: str | None = KEY) -> list[list[int]]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = requests.post(f"{server.url}/generate", json=REQUEST, headers=headers, timeout=60)
    answer.raise_for_status()
    return [reply["output_ids"] for reply in answer.json()]


@pytest.mark.slow
def test_two_servers_start_side_by_side_serve_and_go_one_by_one(tiny_llama: Path) -> None:
    before = dict(os.environ)
    lines: list[str] = []
    config = ServerConfig(model=str(tiny_llama), device="cpu", api_key=KEY, start_timeout_s=300, stop_timeout_s=30)
    first, second = start_fleet(replicate(config, 2), progress=lines.append)
    try:
        assert dict(os.environ) == before
        assert {line.split(": ")[0] for line in lines} == {first.url, second.url}

        assert generate(first) == generate(second)
        assert [len(ids) for ids in generate(first)] == [4, 4]
        with pytest.raises(requests.HTTPError, match="401"):
            generate(first, key=None)
        for server in (first, second):
            assert server.log_path is not None
            assert KEY not in server.log_path.read_text()
            assert not any(KEY in Path(f"/proc/{pid}/cmdline").read_text() for pid in tree(server))

        # After SIGTERM, SGLang ends by itself.
        pids = tree(first)
        folder = first.log_path and first.log_path.parent
        first.stop()
        assert not pids & process_table().keys()
        assert folder is not None
        assert not folder.exists()
        assert "SIGTERM received" in first.log_tail() or "Gracefully exiting" in first.log_tail()

        # The other one crashes: an id outside the vocabulary crashes its scheduler.
        assert second.is_running
        assert generate(second)
        pids = tree(second)
        main = second.pid
        assert main is not None
        with pytest.raises(requests.ConnectionError):
            requests.post(f"{second.url}/generate", json=DEADLY, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        assert wait_gone({main}) == set()
        with pytest.raises(ServerError, match="ended with exit code") as caught:
            second.check()
        assert "which ends:\n" in str(caught.value)
        assert "IndexError" in second.log_tail(400)
        log = second.log_path
        second.stop()
        assert log is not None
        assert log.exists(), "the log of a crash is kept"
        assert not pids & process_table().keys()
    finally:
        stop_fleet((first, second), kill=True)


OWNER = """
import json, sys, time
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.server.supervisor import process_table, tree_pids
server = SGLangServer(ServerConfig(model=sys.argv[1], device="cpu", start_timeout_s=200)).start()
supervisor = process_table()[server.pid].parent
print(json.dumps([server.url, supervisor, *tree_pids(supervisor)]), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_no_process_of_a_real_server_outlives_an_owner_killed_with_sigkill(tiny_llama: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tiny_llama)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        url, *pids = json.loads(owner.stdout.readline())
        assert len(pids) >= 4  # supervisor, server, scheduler, detokenizer
        assert requests.get(f"{url}/model_info", timeout=30).ok
    finally:
        owner.kill()
        owner.wait(30)
    assert wait_gone(set(pids)) == set()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/model_info", timeout=30)


def test_what_sglang_refuses_is_reported_with_the_end_of_its_log(tiny_llama: Path, tmp_path: Path) -> None:
    unknown_flag = SGLangServer(
        ServerConfig(model=str(tiny_llama), device="cpu", extra_args=("--no-such-flag", "3"), start_timeout_s=200)
    )
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "no-such-model", "architectures": ["NoSuchModel"]}')
    unknown_model = SGLangServer(ServerConfig(model=str(strange), device="cpu", start_timeout_s=200))
    unknown_flag.launch()
    unknown_model.launch()
    with unknown_flag, unknown_model:
        with pytest.raises(ServerStartError, match="doesn't know --no-such-flag 3"):
            unknown_flag.wait_ready()
        with pytest.raises(ServerStartError, match="can't serve this model's architecture") as caught:
            unknown_model.wait_ready()
        assert "no-such-model" in caught.value.log_tail


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
def test_two_tensor_parallel_ranks_answer_as_one(
    server: SGLangServer, special_server: Callable[..., SGLangServer]
) -> None:
    assert generate(special_server(tp_size=2), key=None) == generate(server, key=None)
