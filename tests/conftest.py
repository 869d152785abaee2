"""How the test suite is laid out and how its tests share servers and models.

Folders, in the order they run::

    tests/quick/        functions and small objects; starts no process (its conftest.py refuses them), no server, no Ray
    torchrl_sglang/     the examples in the package's docstrings
    tests/fake_sglang/  the fake SGLang server that tests use, and the examples in its docstrings
    tests/contract/     what SGLang does, tested on a real CPU server and, where the fake one does it too, on that
    tests/loop/         TorchRL collectors, losses and weight syncs against a real server; the README's code
    tests/fuzz/         random requests and adapters against a real server
    tests/matrix/       families of models, kinds of tokenizers and chat templates; also data for tests/quick
    tests/chaos/        training while servers and trainers die, freeze, are cut off...; `make chaos`, and a short form
    tests/soak/         does anything grow in an hour?; `make soak`, and a short form
    tests/gpu/          needs CUDA; marked `gpu`, never part of `make test`
    tests/processes/    tests that start processes of their own; no SGLang needed, except one check of the environment.
                        Last, because short files keep two workers busy until both have ended

``make test-quick`` runs the architecture checks and the first two. ``make test`` runs all but the tests marked ``slow``
or ``gpu``; ``pytest -k name`` or ``pytest tests/quick`` runs one part. Nothing needs a network. Every test fails after
four minutes (``timeout`` in pyproject.toml).

Servers. A start costs about 20 seconds and 1.4 GB, so tests share them:

* ``server``: ONE real SGLang server on ``tiny_llama`` for the whole run. Tests may only generate, score and query.
* ``pristine_server``: the same server, for tests that change weights, pause it, or break it. The fixture undoes that
  afterwards: it closes the session, continues generation and reloads the weights from disk; it restarts a server that
  no longer answers, at the same address.
* ``pool``, ``engine``: a fresh ``SGLangPool`` / ``AsyncSGLang`` connected to ``server``.
* ``special_server(tp_size=2, ...)``: a server with other settings, started on first use, shared by all tests that
  request the same settings, at most two alive at a time.
* files of ``SAME_SERVER`` run in the same worker, so that a special server of theirs is started once.
* ``launch_server(...)``: a server for one test, terminated after it: for tests that kill it.

Without SGLang installed the tests that need it are skipped, except in CI (``CI=true``), where they fail.

Models. ``tiny_llama`` and ``tiny_llama_b`` (same shapes, other weights); ``make_model(arch=..., ...)`` for any other;
``model`` and ``tokenizer``: ``tiny_llama``, loaded.
No folder name contains an architecture: TorchRL picks chat templates by words in the path. For the same reason a test
must not put a tokenizer into ``tmp_path``, which contains the test's name.

When the run ends, no server process may be left; if one is, the run fails and names it.
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
# Marks every process of this run, so that the leak check finds those whose parents have ended.
RUN_MARK = f"TORCHRL_SGLANG_TEST_RUN={uuid.uuid4().hex}"
os.environ.update([RUN_MARK.split("=")])
# A shell's background jobs ignore Ctrl-C, and programs that tests start and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tensordict import set_list_to_stack  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

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

START_VERSION = "default"  # SGLang's version name for the weights it was started with
OLD_SGLANG = "0.5.20"
SPECIAL_SERVERS_ALIVE = 2
ORDER = (
    *("tests/test_architecture.py", "tests/quick", "torchrl_sglang", "tests/fake_sglang", "tests/contract"),
    *("tests/loop", "tests/fuzz", "tests/matrix", "tests/test_readme.py", "tests/gpu", "tests/chaos", "tests/soak"),
    "tests/processes",
)
SAME_SERVER = {
    f"tests/loop/test_{name}.py": "flagged_server"
    for name in ("adapters", "adapters_exact", "adapters_replaced", "request_meaning")
}
"""Names of groups of files. Other files are a group each."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(config.rootpath).as_posix()
        return next((i for i, folder in enumerate(ORDER) if path.startswith(folder)), len(ORDER))

    items.sort(key=rank)  # stable: keeps the order within a folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile``, files of a group as if they were one (``loadgroup`` does nothing in pytest 9.2)."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            return SAME_SERVER.get(path, path)

    return Scheduling(config, log)


# ------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_model(arch=..., seed=..., ...)``: the folder of a tiny model; each one is written once per run."""
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


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    """``tiny_llama`` as a Hugging Face model in float32; a new copy for each file."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def logs_go_with_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the logs of failed servers, which are kept, into the test's own folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # read TMPDIR again


# ------------------------------------------------------------------------------------------------------------ servers


@pytest.fixture(scope="session")
def server(needs_sglang: None, tiny_llama: Path) -> Iterator[SGLangServer]:
    """The run's shared server. Tests must not change it; those that do use ``pristine_server``."""
    with started(SGLangServer(ServerConfig(model=str(tiny_llama), device="cpu", stop_timeout_s=0))) as shared:
        yield shared


@pytest.fixture
def pristine_server(server: SGLangServer, tiny_llama: Path) -> Iterator[SGLangServer]:
    """The shared server for a test that changes it; restored afterwards."""
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
    """``special_server(**fields of ServerConfig)``: shared by all tests that pass the same fields."""
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
    """``launch_server(**fields of ServerConfig)``: a server for this test alone."""
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
    """``launch_server(env=old_sglang_env)`` runs SGLang 0.5.20, which has no weight-update session.

    It runs in the same environment, with its own package first on the server process's import path. The package is
    downloaded once (60 MB; no other test needs a network). If that fails, the test is skipped; in CI it fails.
    """
    folder = Path(sys.prefix) / f"sglang-{OLD_SGLANG}"
    if not folder.exists():
        target = Path(tempfile.mkdtemp(dir=sys.prefix))
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        download = subprocess.run([*install, f"sglang=={OLD_SGLANG}"], capture_output=True, text=True, timeout=200)
        if download.returncode != 0:
            shutil.rmtree(target)
            complaint = f"sglang {OLD_SGLANG} can't be downloaded: {download.stderr[-300:]}"
            pytest.fail(complaint) if os.environ.get("CI") else pytest.skip(complaint)
        target.rename(folder)
    return {"PYTHONPATH": f"{folder}:{STAND_INS_PATH}"}


@pytest.fixture(scope="session")
def needs_sglang() -> None:
    if importlib.util.find_spec("sglang") is None:
        complaint = "SGLang is not installed: make env"
        if os.environ.get("CI"):
            pytest.fail(complaint)
        pytest.skip(complaint)


def restore(server: SGLangServer, model: Path) -> None:
    """Restore a server to ``model``'s weights, unpaused, with no session open; restart it if it doesn't answer."""
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
# so an orphaned worker no longer has the mark.
SEEN: set[tuple[int, float]] = set()


def started(server: SGLangServer) -> SGLangServer:
    """Start a server and remember its processes for the leak check."""
    server.start()
    SEEN.update((child.pid, child.create_time()) for child in psutil.Process().children(recursive=True))
    return server


def leftover_servers() -> list[psutil.Process]:
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    left = []
    for process in psutil.process_iter(["pid", "cmdline", "status", "create_time"]):
        words = process.info["cmdline"] or [""]
        # Without the interpreter's path: the repository's folder may contain the name, too.
        command = " ".join(words[Path(words[0]).is_absolute() :])
        if "sglang" not in command or "pytest" in command or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        if "shared_memory/keeper.py" in command:  # of a weight sync that this process has not closed: ends with it
            continue
        seen = (process.pid, process.info["create_time"]) in SEEN
        if seen or process.pid in children or has_run_mark(process.pid):
            left.append(process)
    return left


def has_run_mark(pid: int) -> bool:
    try:
        return RUN_MARK.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, or belongs to another user
        return False
