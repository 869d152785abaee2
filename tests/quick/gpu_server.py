"""A stand-in for a server with a GPU that, like SGLang, dies of calls in a wrong order instead of refusing them."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path
from typing import Any

WEIGHTS = {"enable_memory_saver": True}
WITH_BACKUP = {**WEIGHTS, "enable_weights_cpu_backup": True}


class GpuServer:
    """The calls that matter, in order, and the state behind them."""

    def __init__(self, model: Path, **flags: Any) -> None:
        self.calls: list[str] = []
        self.version = "default"
        self.running = 0
        self.paused = False
        self.released: set[str] = set()
        self.refuse_release = False
        self._model, self._flags = model, {"device": "cuda", **flags}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(*outer.read(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(*outer.do(self.path, body))

            def _answer(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._handler = Handler
        self._listen(0)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def _listen(self, port: int) -> None:
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", port), self._handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        """End as a killed process does."""
        self.http.shutdown()
        self.http.server_close()

    def start_again(self) -> None:
        """Listen at the same address, as a new process."""
        self.calls.append("started again")
        self.version, self.running, self.paused, self.released = "default", 0, False, set()
        self._listen(self.http.server_port)

    def read(self, path: str) -> tuple[int, Any]:
        if path == "/model_info":
            return 200, {"model_path": str(self._model), "weight_version": self.version}
        if path == "/ready":
            return (503 if self.paused else 200), {}
        return (200, self._flags) if path == "/server_info" else (405, {})

    def do(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        tags = set(body.get("tags", ()))
        self.calls.append(" ".join([path, *sorted(tags)]))
        if path == "/flush_cache" and self.running:
            return 400, {"message": "requests are running"}
        if path == "/pause_generation":
            self.paused = True
        elif path == "/continue_generation":
            assert not self.released, "dead: it generates without memory"
            self.paused = False
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/release_memory_occupation":
            assert (self.paused, self.running, self.released & tags) == (True, 0, set()), "dead"
            if self.refuse_release:
                return 400, {"message": "no"}
            self.released |= tags
        elif path == "/resume_memory_occupation":
            assert tags <= self.released, "dead: it resumes what it has"
            self.released -= tags
        return 200, None
