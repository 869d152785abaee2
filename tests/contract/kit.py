"""Helpers of the contract tests: plain HTTP calls to a server, and a trainer's side of a weight-update group.

Nothing here uses the package, because the contract tests describe a *server*.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import requests
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.fake_sglang import FakeServer, FakeServerProcess

PROMPT = [1, 72, 101, 108, 108, 111]
NORM = "model.norm.weight"
"""A small tensor that every Llama has, ``[hidden]``."""
TIMEOUT_S = 60.0
"""Time-out of every call and wait."""


@dataclass(frozen=True)
class Subject:
    """The server under test.

    Attributes:
        url: base URL.
        kind: ``"fake"`` or ``"real"``.
        model: the checkpoint it serves.
    """

    url: str
    kind: str
    model: Path

    def post(self, path: str, timeout_s: float = TIMEOUT_S, **body: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=timeout_s)

    def get(self, path: str, timeout_s: float = TIMEOUT_S) -> requests.Response:
        return requests.get(self.url + path, timeout=timeout_s)

    def generate(self, input_ids: Any = PROMPT, *, tokens: int = 4, sampling: Any = None, **body: Any) -> Any:
        """The parsed reply of a greedy generation of exactly ``tokens`` tokens; the status must be 200."""
        params = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True} | (sampling or {})
        reply = self.post("/generate", input_ids=input_ids, sampling_params=params, **body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def logprobs(self, tokens: list[int]) -> list[float]:
        """The log-probs that the server reports for ``tokens``, without the first."""
        meta = self.generate(tokens, tokens=0, return_logprob=True, logprob_start_len=0)["meta_info"]
        return [entry[0] for entry in meta["input_token_logprobs"][1:]]

    def version(self) -> str:
        version: str = self.get("/model_info").json()["weight_version"]
        return version

    def checksums(self) -> dict[str, str]:
        found: dict[str, str] = self.post("/weights_checker", action="checksum").json()["ranks"][0]["checksums"]
        return found


def subject_of(server: FakeServer | FakeServerProcess) -> Subject:
    """A running fake server as a subject."""
    return Subject(server.url, "fake", Path(server.settings.model_path))


class Background:
    """A call that runs in a thread from the start; :meth:`result` returns its result or raises its error."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._result = call()
            except BaseException as error:  # noqa: BLE001  raised by result()
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def is_done(self, within_s: float = 0.0) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def result(self) -> Any:
        assert self.is_done(TIMEOUT_S), "the call has not returned"
        if self._error is not None:
            raise self._error
        return self._result


class LongRequest:
    """A streamed generation in a thread, with the number of tokens received so far and the last event."""

    def __init__(self, subject: Subject, *, tokens: int = 1200, rid: str | None = None) -> None:
        self.rid = rid or uuid.uuid4().hex
        self._events: list[dict[str, Any]] = []
        self._grew = threading.Condition()
        self._subject = subject
        body = {
            "input_ids": PROMPT,
            "rid": self.rid,
            "stream": True,
            "return_logprob": True,
            "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
        }
        self._run = Background(lambda: self._read(body))

    def _read(self, body: dict[str, Any]) -> None:
        with requests.post(self._subject.url + "/generate", json=body, stream=True, timeout=TIMEOUT_S) as reply:
            for line in reply.iter_lines():
                if line.startswith(b"data: {"):
                    with self._grew:
                        self._events.append(json.loads(line[6:]))
                        self._grew.notify_all()

    @property
    def tokens(self) -> int:
        return len(self._events[-1]["output_ids"]) if self._events else 0

    def running(self, tokens: int = 3) -> LongRequest:
        """Wait until ``tokens`` more tokens have arrived."""
        goal = self.tokens + tokens
        with self._grew:
            assert self._grew.wait_for(lambda: self.tokens >= goal, TIMEOUT_S), "no new tokens"
        return self

    def is_done(self, within_s: float = 0.0) -> bool:
        return self._run.is_done(within_s)

    def end(self) -> dict[str, Any]:
        """Wait for the end and return the last event."""
        self._run.result()
        return self._events[-1]

    def stop(self) -> None:
        """Abort the request and wait for its end."""
        self._subject.post("/abort_request", rid=self.rid)
        self.end()


class Trainer:
    """Rank 0 of a weight-update group, made of torch's public classes with SGLang's store prefixes."""

    def __init__(
        self,
        subject: Subject,
        *,
        tp_size: int = 1,
        group: str | None = None,
        port: int | None = None,
        announced: Background | None = None,
    ) -> None:
        self.subject = subject
        self.group = group or f"group-{uuid.uuid4().hex[:8]}"
        self._store = hosted_store(1 + tp_size, port)
        announced = announced or Background(lambda: self._announce_group(tp_size))
        prefixed = dist.PrefixStore(self.group, self._store)
        prefixed = dist.PrefixStore("cpu/", dist.PrefixStore(f"{self.group}/", prefixed))
        self._gloo = dist.ProcessGroupGloo(prefixed, 0, 1 + tp_size, timedelta(seconds=TIMEOUT_S))
        self.reply: requests.Response = announced.result()

    def _announce_group(self, tp_size: int) -> requests.Response:
        return self.subject.post("/init_weights_update_group", **join_body(self._store, self.group, 1 + tp_size))

    def announce(self, tensors: dict[str, torch.Tensor], *, flattened: bool = True, **more: Any) -> Background:
        """Announce tensors over HTTP; the server replies after it has received them."""
        body: dict[str, Any] = {
            "names": list(tensors),
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
            "shapes": [list(t.shape) for t in tensors.values()],
            "group_name": self.group,
        }
        if flattened:
            body["load_format"] = "flattened_bucket"
        return Background(lambda: self.subject.post("/update_weights_from_distributed", **body | more))

    def broadcast(self, tensors: dict[str, torch.Tensor], *, flattened: bool = True) -> None:
        payload = [tensor.contiguous() for tensor in tensors.values()]
        if flattened:
            payload = [torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in payload])]
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        for tensor in payload:
            self._gloo.broadcast([tensor], options).wait()

    def update(self, tensors: dict[str, torch.Tensor], *, flattened: bool = True, **more: Any) -> requests.Response:
        """Announce and broadcast one bucket."""
        announced = self.announce(tensors, flattened=flattened, **more)
        self.broadcast(tensors, flattened=flattened)
        reply: requests.Response = announced.result()
        return reply

    def leave(self) -> requests.Response:
        return self.subject.post("/destroy_weights_update_group", group_name=self.group)


def hosted_store(world_size: int, port: int | None = None) -> dist.TCPStore:
    """A store on ``port`` of this host, or on a free port; it does not wait for workers."""
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, world_size, True, timedelta(seconds=TIMEOUT_S), wait_for_workers=False)


def join_body(store: dist.TCPStore, group: str, world_size: int = 2) -> dict[str, Any]:
    """Body of ``/init_weights_update_group``."""
    return {
        "master_address": "127.0.0.1",
        "master_port": store.port,
        "rank_offset": 1,
        "world_size": world_size,
        "group_name": group,
        "backend": "gloo",
    }


@contextmanager
def session(subject: Subject) -> Iterator[None]:
    """An open weight-update session."""
    assert subject.post("/begin_weight_update").status_code == 200
    yield
    assert subject.post("/end_weight_update").status_code == 200


def refused(reply: requests.Response) -> str:
    """The message of a refusal."""
    body = reply.json()
    assert (reply.status_code, body["success"]) == (400, False), body
    message: str = body["message"]
    return message


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


_DYING_TRAINER = """
import os, pathlib, sys
from tests.contract.kit import *
subject = Subject(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))
trainer = Trainer(subject, group=sys.argv[4])
if sys.argv[5] == "announced":
    announced = announce_until_stuck(trainer, {NORM: weights_of(subject.model)[NORM]})
os._exit(0)
"""


def subject_is_stuck(subject: Subject) -> bool:
    """Whether the scheduler is blocked; the HTTP frontend still accepts the request."""
    try:
        subject.get("/server_info", timeout_s=1.5)
    except requests.Timeout:
        return True
    return False


def announce_until_stuck(trainer: Trainer, tensors: dict[str, torch.Tensor]) -> Background:
    """Announce a bucket and wait until the server's scheduler is blocked in its broadcast."""
    announced = trainer.announce(tensors)
    while not subject_is_stuck(trainer.subject):
        assert not announced.is_done()
    return announced


def trainer_that_dies(subject: Subject, group: str, when: str) -> None:
    """Run a trainer process that forms a group and exits, when it has ``"joined"`` or has ``"announced"`` a bucket."""
    arguments = [subject.url, subject.kind, str(subject.model), group, when]
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", _DYING_TRAINER, *arguments], check=True, timeout=TIMEOUT_S, cwd=root)
