"""The suite's manual.

Layout, in the order it runs::

    tests/quick/       functions and small objects, no server: seconds
    torchrl_sglang/   the examples in the package's docstrings
    tests/contract/   what we believe of SGLang, asked of a real CPU server (and of the fake one, where it plays along)
    tests/loop/       the whole: TorchRL collectors, losses and syncs against a real server; the README's code
    tests/gpu/        needs CUDA; marked `gpu`, never part of `make test`

``make test`` runs all but the tests marked ``slow`` or ``gpu``; ``pytest -k name`` or ``pytest tests/quick`` one part.
Nothing needs a network. No test may wait for ever: each fails after four minutes (``timeout`` in pyproject.toml).

Servers. A start costs about 20 seconds and 1.4 GB, so the run shares them:

* ``server``: ONE real SGLang server on ``tiny_llama`` for the whole run. Read-only for its users: generate, score, ask.
* ``pristine_server``: the same server, for tests that change weights, pause it, or break it. Whatever they did is
  undone afterwards: session closed, generation continued, weights read again from disk; a server that no longer
  answers is restarted at its address.
* ``pool``, ``engine``: a fresh ``SGLangPool`` / ``AsyncSGLang`` connected to ``server``.
* ``special_server(tp_size=2, ...)``: a server with other settings, started when first asked for, shared by all who ask
  for the same, at most two alive at a time.
* ``launch_server(...)``: one that nobody else sees, gone after the test: for tests that kill it.

Without SGLang installed the tests that need it are skipped, except in CI (``CI=true``), where they fail.

Models. ``tiny_llama`` and ``tiny_llama_b`` (same shapes, other weights); ``make_model(arch=..., ...)`` for any other.
No folder has an architecture's name in it: TorchRL picks chat templates by words in the path. For the same reason
``tmp_path`` is a bad place for a tokenizer, since it carries the test's name.

When the run ends, no server process may be left; if one is, the run fails and says which.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before transformers is imported. Servers inherit it too.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
# Marks every process that comes from this run, so that the leak check finds those whose parents are gone.
RUN_MARK = f"TORCHRL_SGLANG_TEST_RUN={uuid.uuid4().hex}"
os.environ.update([RUN_MARK.split("=")])
# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import psutil  # noqa: E402
import pytest  # noqa: E402
from tensordict import set_list_to_stack  # noqa: E402

from torchrl_sglang.client import SGLangClient  # noqa: E402
from torchrl_sglang.config import ClientConfig, ServerConfig  # noqa: E402
from torchrl_sglang.engine import AsyncSGLang  # noqa: E402
from torchrl_sglang.errors import RequestRejectedError, ServerError  # noqa: E402
from torchrl_sglang.pool import SGLangPool  # noqa: E402
from torchrl_sglang.protocol.control import build_continue, build_end_update, build_update_from_disk  # noqa: E402
from torchrl_sglang.server import SGLangServer  # noqa: E402
from torchrl_sglang.server.cpu import STAND_INS_PATH  # noqa: E402
from torchrl_sglang.testing import make_tiny_model  # noqa: E402

set_list_to_stack(True).set()

START_VERSION = "default"  # what SGLang calls the weights it was started with
OLD_SGLANG = "0.5.20"
SPECIAL_SERVERS_ALIVE = 2
ORDER = (
    *("tests/test_architecture.py", "tests/quick", "torchrl_sglang", "tests/contract"),
    *("tests/loop", "tests/test_readme.py", "tests/gpu"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(config.rootpath).as_posix()
        return next((i for i, folder in enumerate(ORDER) if path.startswith(folder)), len(ORDER))

    items.sort(key=rank)  # stable: within a folder the order stays


# ------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_model(arch=..., seed=..., ...)``: a tiny model, each one made once a run."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def make(**settings: Any) -> Path:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = make_tiny_model(folder / f"tiny_{len(made)}", **settings)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_model: Callable[..., Path]) -> Path:
    return make_model(arch="llama", seed=0)


@pytest.fixture(scope="session")
def tiny_llama_b(make_model: Callable[..., Path]) -> Path:
    return make_model(arch="llama", seed=7)


@pytest.fixture
def logs_go_with_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs of servers that failed are kept; here in the test's own folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # read TMPDIR anew


# ------------------------------------------------------------------------------------------------------------ servers


@pytest.fixture(scope="session")
def server(needs_sglang: None, tiny_llama: Path) -> Iterator[SGLangServer]:
    """The run's shared server. Don't change what it is: that is what ``pristine_server`` is for."""
    with started(SGLangServer(ServerConfig(model=str(tiny_llama), device="cpu", stop_timeout_s=0))) as shared:
        yield shared


@pytest.fixture
def pristine_server(server: SGLangServer, tiny_llama: Path) -> Iterator[SGLangServer]:
    """The shared server for a test that changes it; brought back before the next test."""
    restore(server, tiny_llama)
    yield server
    restore(server, tiny_llama)


@pytest.fixture
def pool(server: SGLangServer) -> Iterator[SGLangPool]:
    made = SGLangPool([SGLangClient(server.url)])
    made.connect()
    assert made.info.weight_version == START_VERSION, (
        "an earlier test changed the shared server's weights: it must use pristine_server"
    )
    yield made
    made.close()


@pytest.fixture
def engine(server: SGLangServer) -> Iterator[AsyncSGLang]:
    with AsyncSGLang.connect(server.url) as connected:
        yield connected


@pytest.fixture(scope="session")
def special_server(needs_sglang: None, tiny_llama: Path) -> Iterator[Callable[..., SGLangServer]]:
    """``special_server(**fields of ServerConfig)``: shared by everybody who asks for the same fields."""
    alive: OrderedDict[str, SGLangServer] = OrderedDict()

    def get(**fields: Any) -> SGLangServer:
        config = ServerConfig(**{"model": str(tiny_llama), "device": "cpu", "stop_timeout_s": 0, **fields})
        key = repr((config, config.api_key, config.admin_api_key))
        if key not in alive:
            while len(alive) >= SPECIAL_SERVERS_ALIVE:
                alive.popitem(last=False)[1].stop(kill=True)
            alive[key] = started(SGLangServer(config))
        alive.move_to_end(key)
        if not alive[key].is_running:
            alive[key].restart()
        return alive[key]

    yield get
    for one in alive.values():
        one.stop(kill=True)


@pytest.fixture
def launch_server(needs_sglang: None, tiny_llama: Path) -> Iterator[Callable[..., SGLangServer]]:
    """``launch_server(**fields of ServerConfig)``: a server of the test's own."""
    launched: list[SGLangServer] = []

    def launch(**fields: Any) -> SGLangServer:
        config = ServerConfig(**{"model": str(tiny_llama), "device": "cpu", "stop_timeout_s": 0, **fields})
        launched.append(SGLangServer(config))
        return started(launched[-1])

    yield launch
    for one in launched:
        one.stop(kill=True)


@pytest.fixture(scope="session")
def old_sglang_env() -> dict[str, str]:
    """``launch_server(env=old_sglang_env)`` runs SGLang 0.5.20, which knows no weight-update session.

    It runs in the same environment, its own package first on the server process's import path. It is fetched once
    (60 MB, the only test that may need a network); where that can't be done, the test is skipped, and fails in CI.
    """
    folder = Path(sys.prefix) / f"sglang-{OLD_SGLANG}"
    if not folder.exists():
        fresh = Path(tempfile.mkdtemp(dir=sys.prefix))
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(fresh)]
        fetched = subprocess.run([*install, f"sglang=={OLD_SGLANG}"], capture_output=True, text=True, timeout=200)
        if fetched.returncode != 0:
            shutil.rmtree(fresh)
            complaint = f"sglang {OLD_SGLANG} can't be fetched: {fetched.stderr[-300:]}"
            pytest.fail(complaint) if os.environ.get("CI") else pytest.skip(complaint)
        fresh.rename(folder)
    return {"PYTHONPATH": f"{folder}:{STAND_INS_PATH}"}


@pytest.fixture(scope="session")
def needs_sglang() -> None:
    if importlib.util.find_spec("sglang") is None:
        complaint = "SGLang is not installed: make env"
        if os.environ.get("CI"):
            pytest.fail(complaint)
        pytest.skip(complaint)


def restore(server: SGLangServer, model: Path) -> None:
    """Bring a server back to ``model``'s weights, unpaused, with no session open; restart it if it doesn't answer."""
    client = SGLangClient(server.url, ClientConfig(control_timeout_s=20, update_timeout_s=20))
    try:
        for undo in (build_end_update(), build_continue()):
            with contextlib.suppress(RequestRejectedError):  # no session was open; nothing was paused
                client.send(undo)
        client.send(build_update_from_disk(str(model), version=START_VERSION))
    except ServerError:
        server.restart()
    finally:
        client.close()


# --------------------------------------------------------------------------------------------------------- leak check


@pytest.fixture(scope="session", autouse=True)
def no_server_is_left() -> Iterator[None]:
    yield
    left = leftover_servers()
    for process in left:
        process.kill()
    assert not left, f"server processes were left behind: {[' '.join(p.info['cmdline'])[:200] for p in left]}"


# Processes of the fixtures' servers, as (pid, start time). SGLang's workers overwrite their environment with a title,
# so that an orphaned one carries no mark any more.
SEEN: set[tuple[int, float]] = set()


def started(server: SGLangServer) -> SGLangServer:
    """Start a server and remember its processes for the leak check."""
    server.start()
    SEEN.update((child.pid, child.create_time()) for child in psutil.Process().children(recursive=True))
    return server


def leftover_servers() -> list[psutil.Process]:
    ours = {child.pid for child in psutil.Process().children(recursive=True)}
    left = []
    for process in psutil.process_iter(["pid", "cmdline", "status", "create_time"]):
        words = process.info["cmdline"] or [""]
        # Without the interpreter's path: the folder of a clone has the name, too.
        command = " ".join(words[Path(words[0]).is_absolute() :])
        if "sglang" not in command or "pytest" in command or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        seen = (process.pid, process.info["create_time"]) in SEEN
        if seen or process.pid in ours or carries_mark(process.pid):
            left.append(process)
    return left


def carries_mark(pid: int) -> bool:
    try:
        return RUN_MARK.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it ended meanwhile, or is somebody else's
        return False
