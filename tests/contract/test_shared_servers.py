"""The server fixtures of tests/conftest.py: they start, share and restore real servers, and find leftover ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from torchrl_sglang import SamplingParams
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_begin_update, build_pause, build_update_from_disk
from torchrl_sglang.server import SGLangServer

PROMPT = [[5, 6, 7, 8]]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0)


def tokens(url: str) -> list[int]:
    pool = SGLangPool([SGLangClient(url)])
    pool.connect()
    try:
        return pool.generate(PROMPT, GREEDY)[0].output_ids
    finally:
        pool.close()


@pytest.fixture(scope="module")
def original_tokens(server: SGLangServer) -> list[int]:
    return tokens(server.url)


def change_weights(server: SGLangServer, other: Path) -> None:
    SGLangClient(server.url).send(build_update_from_disk(str(other), version="5@somebody"))


def change_pause(server: SGLangServer, other: Path) -> None:
    SGLangClient(server.url).send(build_pause("abort"))


def change_session(server: SGLangServer, other: Path) -> None:
    client = SGLangClient(server.url)
    client.send(build_pause("abort"))
    client.send(build_begin_update())


@pytest.mark.parametrize("change", [change_weights, change_pause, change_session])
def test_a_pristine_server_is_restored_after_a_test_has_changed_it(
    change: Callable[[SGLangServer, Path], None],
    server: SGLangServer,
    original_tokens: list[int],
    tiny_llama_b: Path,
    request: pytest.FixtureRequest,
):
    change(server, tiny_llama_b)
    request.getfixturevalue("pristine_server")
    client = SGLangClient(server.url)
    client.connect()
    assert client.info.weight_version == "default"
    assert tokens(server.url) == original_tokens


def test_the_other_model_generates_other_tokens(
    pristine_server: SGLangServer, original_tokens: list[int], tiny_llama_b: Path
):
    change_weights(pristine_server, tiny_llama_b)
    assert tokens(pristine_server.url) != original_tokens


@pytest.mark.slow
def test_a_special_server_is_shared_by_requests_for_the_same_settings(special_server: Callable[..., SGLangServer]):
    first = special_server(api_key="k")
    assert special_server(api_key="k") is first
    assert first.is_running


@pytest.mark.parametrize("marked", [True, False])
def test_an_orphaned_server_process_of_this_run_is_found(marked: bool, request: pytest.FixtureRequest):
    # A stand-in named like a server, whose parent exits at once. SGLang's own workers lose the mark.
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))
    script = "import os, time; os.fork() and os._exit(0); print(os.getpid(), flush=True); time.sleep(60)"
    environment = dict(os.environ) if marked else {}
    with psutil.Popen([sys.executable, "-c", script, "sglang"], stdout=-1, text=True, env=environment) as parent:
        orphan = psutil.Process(int(parent.stdout.readline()))
        parent.wait(10)
    identity = (orphan.pid, orphan.create_time())
    try:
        if not marked:
            assert orphan not in conftest.leftover_servers(), "a server of another run was counted"
            conftest.SEEN.add(identity)
        assert orphan in conftest.leftover_servers()
    finally:
        conftest.SEEN.discard(identity)
        orphan.kill()
