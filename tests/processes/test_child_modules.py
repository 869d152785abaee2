"""A module in the working directory that is named like one of Python's is not imported by servers and routers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.fake_sglang.fake_python import make_python
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.config import RouterConfig, ServerConfig
from torchrl_sglang.server import SGLangRouter, SGLangServer

pytestmark = pytest.mark.usefixtures("logs_go_with_the_test")

# A router that needs `queue` and a module of the user's PYTHONPATH, and says what it imported.
ROUTER = """
import http.server, queue, sys, mine
print("imported", queue.__file__, mine.__file__, flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), http.server.BaseHTTPRequestHandler).serve_forever()
"""


@pytest.fixture
def misleading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a ``queue.py`` that no program survives."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("queue", "socket", "json"):
        (folder / f"{name}.py").write_text("raise SystemExit('the module of the working directory was imported')")
    monkeypatch.chdir(folder)
    return folder


def test_a_server_does_not_import_it(misleading: Path, tmp_path: Path, tiny_llama: Path) -> None:
    config = ServerConfig(model=str(tiny_llama), python=make_python(tmp_path), device="cpu")
    with SGLangServer(config) as server:
        assert SGLangClient(server.url).connect().model_path == str(tiny_llama)


def test_a_router_does_not_import_it_and_finds_the_users_modules(
    misleading: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "users" / "sglang_router"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_router.py").write_text(ROUTER)
    (misleading / "lib").mkdir()
    (misleading / "lib" / "mine.py").touch()
    monkeypatch.setenv("PYTHONPATH", f":{package.parent}:lib")  # an empty entry is the working directory
    router = SGLangRouter(RouterConfig(python=sys.executable, start_timeout_s=30))
    router.start()
    log = router.log_tail()
    router.stop()
    assert "imported" in log
    assert "lib/mine.py" in log
    assert str(misleading / "queue.py") not in log
