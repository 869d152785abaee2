"""The life cycle of servers and routers: their processes end with the owner, and errors say what happened.

A small program takes SGLang's place and behaves worse than SGLang: it ignores SIGTERM, starts a child that leaves the
session and another that is orphaned, and fails on demand. ``tests/loop/test_server.py`` tests the real server.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes.process_trees import tree, wait_gone
from torchrl_sglang.config import RouterConfig, ServerConfig
from torchrl_sglang.errors import ConfigError, ServerError, ServerStartError
from torchrl_sglang.server import SGLangRouter, SGLangServer, start_fleet, stop_fleet
from torchrl_sglang.server.ports import is_bindable
from torchrl_sglang.server.supervisor import process_table

pytestmark = pytest.mark.usefixtures("logs_go_with_the_test")

# Used as `python`: runs the supervisor in the real Python, and acts as the server for `-m sglang.launch_server ...`.
PROGRAM = """#!{python}
import http.server, os, signal, socket, subprocess, sys, time
if sys.argv[1] == "-I":
    os.execv("{python}", ["{python}", *sys.argv[1:]])
arguments = sys.argv[1:]
mode = os.environ.get("MODE", "good")
port = int(arguments[arguments.index("--port") + 1])
print("server_args=", arguments, open(arguments[arguments.index("--config") + 1]).read() if "--config" in arguments else "", flush=True)
if mode == "crash":
    print("Traceback (most recent call last):")
    sys.exit("torch.OutOfMemoryError: CUDA out of memory.")
if mode == "port stolen once" and not os.path.exists(os.environ["FLAG"]):
    open(os.environ["FLAG"], "w").close()
    sys.exit("[Errno 98] error while attempting to bind on address: address already in use")
if mode == "stuck":
    print("Load weight begin.\\nLoading safetensors shards: 3% Completed | 1/30", end="\\r", flush=True)
    time.sleep(600)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeper = ["{python}", "-I", "-S", "-c", "import time; time.sleep(600)"]
subprocess.Popen(sleeper, start_new_session=True)
subprocess.run(["{python}", "-I", "-S", "-c", "import subprocess; subprocess.Popen({{!r}})".format(sleeper)])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if mode == "old" and self.path == "/ready" else 200)
        self.end_headers()

host = arguments[arguments.index("--host") + 1]
http.server.HTTPServer.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
http.server.HTTPServer((host, port), Handler).serve_forever()
"""  # noqa: E501


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bin") / "python"
    path.write_text(PROGRAM.format(python=os.path.realpath(sys.executable)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def make(program: Path, tmp_path: Path) -> Iterator[Callable[..., SGLangServer]]:
    servers = []

    def make_server(mode: str = "good", **settings: object) -> SGLangServer:
        env = {"MODE": mode, "FLAG": str(tmp_path / "flag")}
        defaults = {"model": "org/model", "python": str(program), "device": "cpu", "start_timeout_s": 30.0}
        server = SGLangServer(ServerConfig(**{**defaults, "env": env, **settings}))
        servers.append(server)
        return server

    yield make_server
    stop_fleet(servers, kill=True)


@pytest.mark.parametrize("mode", ["good", "old", "stubborn"])
def test_a_server_serves_within_its_block_and_leaves_nothing_behind(
    make: Callable[..., SGLangServer], mode: str
) -> None:
    with make(mode, stop_timeout_s=0.5) as server:
        pids = tree(server)
        assert len(pids) == 4  # supervisor, server, the child that left the session, the orphan
        assert server.is_running
        assert server.pid in pids
        log = server.log_path
        assert log is not None
        assert "server_args=" in server.log_tail()
    assert not pids & process_table().keys(), "stop() came back before everything had ended"
    assert not server.is_running
    assert server.pid is None
    assert not log.parent.exists()
    assert "server_args=" in server.log_tail()
    server.stop()


def test_an_exception_in_the_block_ends_the_server_at_once(make: Callable[..., SGLangServer]) -> None:
    server = make("stubborn", stop_timeout_s=60.0).start()
    pids = tree(server)
    with pytest.raises(KeyError), server:
        raise KeyError
    assert not pids & process_table().keys()


def test_a_server_ends_when_its_object_is_collected(make: Callable[..., SGLangServer], program: Path) -> None:
    server = SGLangServer(ServerConfig(model="org/model", python=str(program), device="cpu")).start()
    pids = tree(server)
    del server
    gc.collect()
    assert not pids & process_table().keys()


OWNER = """
import os, signal, sys, threading, time
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.server.supervisor import process_table, tree_pids
server = SGLangServer(ServerConfig(model="org/model", python=sys.argv[1], device="cpu", env={"MODE": "stubborn"}))
def main():
    server.start()
    supervisor = process_table()[server.pid].parent
    print(supervisor, *tree_pids(supervisor), flush=True)
ENDING
"""
ENDINGS = {
    "killed with SIGKILL": "main(); time.sleep(600)",
    "told to end with SIGTERM": "main(); time.sleep(600)",
    "interrupted with SIGINT": "main(); time.sleep(600)",
    "at the end of its script": "main()",
    "by an exception": "main(); raise KeyError",
    "by os._exit": "main(); os._exit(3)",
    "killed with a fork of it alive": "main(); os.fork() and os.kill(os.getpid(), 9); time.sleep(20)",
    "after launching from a thread": "t = threading.Thread(target=main); t.start(); t.join()",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left_when_the_owner_ends(program: Path, ending: str) -> None:
    script = OWNER.replace("ENDING", ENDINGS[ending])
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert owner.stdout is not None
    pids = {int(word) for word in owner.stdout.readline().split()}
    assert len(pids) == 4
    if "SIG" in ending:
        owner.send_signal(getattr(signal, ending.split()[-1]))
    owner.wait(30)
    assert wait_gone(pids) == set()
    owner.stdout.close()


def test_a_server_outlives_the_thread_that_started_it(make: Callable[..., SGLangServer]) -> None:
    server = make()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    time.sleep(1.2)  # the supervisor checks its owner every 0.5 s
    assert server.is_running


def child_stops_it(server: SGLangServer, answers: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    server.stop(kill=True)
    answers.put((server.is_running, server.pid, server.url, repr(server).endswith("attached)")))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_copy_in_another_process_is_attached_and_ends_nothing(make: Callable[..., SGLangServer], method: str) -> None:
    server = make().start()
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    worker = context.Process(target=child_stops_it, args=(server, answers))
    worker.start()
    assert answers.get(timeout=60) == (True, None, server.url, True)
    worker.join(30)
    assert worker.exitcode == 0
    assert server.is_running


def test_a_raw_fork_that_exits_normally_ends_nothing(make: Callable[..., SGLangServer]) -> None:
    server = make().start()
    script = "import gc; del server; gc.collect()"
    pid = os.fork()
    if pid == 0:
        try:
            exec(script, {"server": server})
            server.__exit__(None, None, None)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert server.is_running


def test_an_attached_copy_reports_that_the_server_has_ended_and_starts_nothing(
    make: Callable[..., SGLangServer],
) -> None:
    server = make().start()
    copy = pickle.loads(pickle.dumps(server))
    assert copy.is_running
    with pytest.raises(ConfigError, match="attached copy"):
        copy.start()
    server.stop(kill=True)
    assert not copy.is_running
    with pytest.raises(ServerError, match="is not running"):
        copy.check()


def test_a_crash_during_the_start_shows_the_log_and_what_to_do(make: Callable[..., SGLangServer]) -> None:
    server = make("crash")
    with pytest.raises(ServerStartError, match=r"exit code 1\. Out of memory: lower mem_fraction_static") as caught:
        server.start()
    assert "CUDA out of memory" in caught.value.log_tail
    assert caught.value.server == server.url
    log = Path(str(caught.value).split("Log: ")[1].split(",")[0])
    assert "CUDA out of memory" in log.read_text(), "the log of a failure is kept"
    assert not server.is_running


def test_a_python_without_sglang_is_reported_with_what_to_install(
    make: Callable[..., SGLangServer], tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True, timeout=60)
    server = make(python=str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ServerStartError, match="torchrl-sglang install-cpu-server"):
        server.start()


def test_a_server_that_never_gets_ready_is_ended_at_the_deadline(make: Callable[..., SGLangServer]) -> None:
    server = make("stuck", start_timeout_s=2.5)
    lines: list[str] = []
    server.launch()
    pids = tree(server)
    with pytest.raises(ServerStartError, match=r"not ready after 2\.5 s"):
        server.wait_ready(progress=lines.append)
    assert not pids & process_table().keys()
    assert re.fullmatch(r"loading the weights \(usually .*\), 3 %, \d s", lines[-1])


def test_ctrl_c_while_it_starts_ends_it(make: Callable[..., SGLangServer]) -> None:
    server = make("stuck")
    server.launch()
    pids = tree(server)

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        server.wait_ready(progress=interrupt)
    assert not pids & process_table().keys()


def test_a_crash_of_a_ready_server_is_reported_with_its_log(make: Callable[..., SGLangServer]) -> None:
    server = make().start()
    server.check()
    pids = tree(server)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSEGV)
    assert wait_gone(pids - {min(pids)}) == set()  # all but the supervisor, a zombie until stop()
    with pytest.raises(ServerError, match=r"(?s)exit code 139 \(SIGSEGV\).*server_args=") as caught:
        server.check()
    assert caught.value.server == server.url
    log = server.log_path
    assert log is not None
    server.stop()
    assert log.exists()
    assert not pids & process_table().keys()


def test_nothing_is_left_when_the_supervisor_itself_is_killed(make: Callable[..., SGLangServer]) -> None:
    server = make().start()
    pids = tree(server)
    assert server.pid is not None
    supervisor_pid = process_table()[server.pid].parent
    os.kill(supervisor_pid, signal.SIGKILL)
    assert wait_gone({server.pid}) == set()
    assert not server.is_running
    # Processes that left the session can't be found any more. SGLang's stay in it, and have a parent-death signal.
    strays = pids & process_table().keys()
    for pid in strays:
        os.kill(pid, signal.SIGKILL)


def test_a_restarted_server_has_the_same_address(make: Callable[..., SGLangServer]) -> None:
    server = make().start()
    url, pid = server.url, server.pid
    server.restart()
    assert server.is_running
    assert server.url == url
    assert server.pid != pid


def test_a_second_start_is_refused_while_it_runs(make: Callable[..., SGLangServer]) -> None:
    server = make().start()
    with pytest.raises(ConfigError, match="already running"):
        server.start()
    assert server.is_running


def test_a_picked_port_that_another_program_takes_is_replaced(
    make: Callable[..., SGLangServer], tmp_path: Path
) -> None:
    server = make("port stolen once").start()
    assert server.is_running
    (tmp_path / "flag").unlink()
    with pytest.raises(ServerStartError, match="took the port"):
        make("port stolen once", port=31160).start()


def test_a_port_in_use_is_refused_before_anything_starts(make: Callable[..., SGLangServer]) -> None:
    server = make(port=31161).start()
    with pytest.raises(ServerStartError, match="port 31161 .* in use"):
        make(port=31161).start()
    assert server.is_running
    with pytest.raises(ServerStartError, match="port=None picks a free port"):
        make(host="192.0.2.1", api_key=False).start()


def test_keys_are_neither_in_the_log_nor_on_a_command_line_nor_in_a_file(
    make: Callable[..., SGLangServer], tmp_path: Path
) -> None:
    key = 'correct-horse\\"battery'
    with make(api_key=key, admin_api_key=key + "2", log_dir=tmp_path / "logs") as server:
        assert '"api-key": "***"' in server.log_tail()
        assert "battery" not in server.log_tail()
        commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in tree(server)]
        assert any("launch_server" in command for command in commands)
        assert not any(key in command for command in commands)
        assert key not in repr(server)
        assert [path.name for path in (tmp_path / "logs").iterdir()] == [server.log_path and server.log_path.name]
    assert (tmp_path / "logs").exists(), "the user's log folder must stay"


@pytest.mark.parametrize("host", ["0.0.0.0", "::1", "::"])
def test_servers_on_other_hosts_than_ipv4_loopback_are_reached(make: Callable[..., SGLangServer], host: str) -> None:
    if ":" in host and not is_bindable("::1", 31162):
        pytest.skip("this machine has no IPv6")
    server = make(host=host, api_key=False).start()
    with urllib.request.urlopen(f"{server.url}/ready", timeout=10) as answer:
        assert answer.status == 200


def test_a_fleet_starts_and_stops_in_parallel(make: Callable[..., SGLangServer]) -> None:
    config = make().config
    lines: list[str] = []
    servers = start_fleet([config, config, config], progress=lines.append)
    assert len({server.url for server in servers}) == 3
    pids = set().union(*(tree(server) for server in servers))
    stop_fleet(servers, kill=True)
    assert not pids & process_table().keys()


def test_a_fleet_in_which_one_server_fails_is_stopped(make: Callable[..., SGLangServer]) -> None:
    good, stuck, bad = make().config, make("stuck").config, make("crash").config
    before = set(process_table())
    with pytest.raises(ServerStartError, match="Out of memory"):
        start_fleet([good, stuck, bad])
    ours = {pid for pid, row in process_table().items() if row.parent == os.getpid()} - before
    assert ours == set()
    with pytest.raises(ConfigError):
        start_fleet([good, ServerConfig(model="/no/such/model", device="cpu")])
    assert {pid for pid, row in process_table().items() if row.parent == os.getpid()} - before == set()


def test_a_router_has_the_life_cycle_of_a_server(program: Path) -> None:
    router = SGLangRouter(RouterConfig(python=str(program), start_timeout_s=30))
    with pytest.raises(ConfigError, match="the router's address is known once it is launched"):
        _ = router.url
    url, pids = router.start().url, tree(router)
    assert router.pid is not None
    os.kill(router.pid, signal.SIGSEGV)
    assert wait_gone(pids - {min(pids)}) == set()
    assert router.has_crashed
    assert not router.is_running
    assert "server_args=" in router.log_tail()
    assert router.start().url == url, "a restarted router must have the same address"
    pids = tree(router)
    del router
    gc.collect()
    assert not pids & process_table().keys()


def test_a_router_that_does_not_start_is_reported_with_its_log(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODE", "crash")
    router = SGLangRouter(RouterConfig(python=str(program), start_timeout_s=30))
    with pytest.raises(ServerStartError, match=r"the router ended with exit code 1\. Out of memory") as caught:
        router.start()
    assert "CUDA out of memory" in caught.value.log_tail
    assert caught.value.server == router.url
    monkeypatch.setenv("MODE", "stuck")
    with pytest.raises(ServerStartError, match=r"the router is not ready after 1 s"):
        SGLangRouter(RouterConfig(python=str(program), start_timeout_s=1)).start()
