"""Runs one row of the failure matrix on fake servers and records the outcome, which test_failure_matrix.py checks.

In every row other clients generate while the update fails. Each token of their replies must have been computed by the
weights that its version label names. The fake server's log-probs depend on all its tensors, so one stale tensor changes
them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.fake_sglang import FakeSettings, Fault, logprobs, signature
from tests.fake_sglang.model import read_checkpoint
from tests.loop.forked_processes import ForkedServer, ProcessFactory, wait_until
from torchrl_sglang import (
    ClientConfig,
    ConfigError,
    SamplingParams,
    SGLangError,
    SyncConfig,
    WeightSync,
    WeightSyncError,
)
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.generate import build_generate, parse_generate
from torchrl_sglang.protocol.messages import GenerateReply
from torchrl_sglang.protocol.version import version_number
from torchrl_sglang.testing.models import VOCAB_SIZE

JOIN = "/init_weights_update_group"
UPDATE = "/update_weights_from_distributed"
TENSORS = "/update_weights_from_tensor"
CLIENT = ClientConfig(
    connect_timeout_s=3, probe_timeout_s=3, control_timeout_s=3, update_timeout_s=4, generate_timeout_s=10
)
SYNC = SyncConfig(bucket_bytes=60_000, group_timeout_s=4, bucket_timeout_s=3, fixed_timeout_s=12, verify="full")
MAX_UPDATE_S = 40.0
"""The sum of the time-outs above: liveness check (3), forming the group (4), the update itself (12), verification (4)
and, for each of the last three, closing a group with a server that does not answer (3 to 6)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the matrix: what fails, and the expected outcome.

    Attributes:
        name: a description.
        path: path of the request at which it fails.
        nth: which request to that path, counted from the beginning of the first push.
        how: ``refuse``, ``die``, ``drop``, ``half_reply``, ``no_communicator``, ``hang``: a fault armed at the server.
            ``slow``: the server waits half a second, and the update succeeds. ``late``: it continues after the client's
            time-out.
            ``stop``: the server gets SIGSTOP there. ``trainer``: the *trainer* gets SIGKILL while the server is there.
        at: point in the request's processing, see :class:`Fault`.
        message: message of a refusal.
        servers: number of servers.
        failing_server: index of the server that fails.
        version: SGLang version the servers behave like.
        sync: settings of the update.
        states: expected ``server_weights`` after the failure, server by server; ``None`` if the push succeeds.
        message_part: expected part of the error's message, besides the failing server's URL.
        dirty: whether the servers have a dirty version when a new trainer connects.
        repair: what happens to the server before the second push: ``restart`` (same address), ``resume``, or nothing.
    """

    name: str
    path: str = ""
    nth: int = 1
    how: str = "refuse"
    at: str = "arrived"
    message: str = "refused by the fake server"
    servers: int = 1
    failing_server: int = 0
    version: str = "0.5.23"
    sync: SyncConfig = SYNC
    states: tuple[str, ...] | None = None
    message_part: str = ""
    dirty: bool = False
    repair: str = ""


@dataclass
class Outcome:
    """What happened in a row. The second push is meant to restore all servers."""

    urls: list[str] = field(default_factory=list)
    error: SGLangError | None = None
    states: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    answers_after_s: float = 0.0
    pushed_version: int | None = None
    serving_after_failure: dict[str, int] = field(default_factory=dict)
    quarantined: list[str] = field(default_factory=list)
    restore_error: SGLangError | None = None
    restored_version: int | None = None
    serving_after_restore: dict[str, int] = field(default_factory=dict)
    replies: list[tuple[list[int], GenerateReply]] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)


class MatrixRunner:
    """Runs rows with three models and processes of a factory."""

    def __init__(self, processes: ProcessFactory, models: Sequence[Path]) -> None:
        self._processes = processes
        self.models = list(models)
        self.tensors = [read_checkpoint(model) for model in models]
        self._signatures = [signature(tensors) for tensors in self.tensors]

    def serve(self) -> ForkedServer:
        """A server with model 0."""
        return self._processes.start_server(FakeSettings(model_path=self.models[0]))

    def run(self, row: Row) -> Outcome:
        """The servers start with model 0; the first push (model 1) fails, the second (model 2) must succeed."""
        is_found = row.sync.transport == "ipc"
        settings = FakeSettings(model_path=self.models[0], version=row.version, is_found=is_found)
        servers = [self._processes.start_server(settings) for _ in range(row.servers)]
        outcome = Outcome(urls=[server.url for server in servers])
        sync: WeightSync | None = None
        try:
            # A fault at /generate must hit the verification's request, not one of other clients.
            with BackgroundClients(servers if row.path != "/generate" else []) as clients:
                start = time.monotonic()
                if row.how == "trainer":
                    self._lose_trainer(row, servers, outcome)
                    pool = SGLangPool([SGLangClient(server.url, CLIENT) for server in servers])
                    sync = WeightSync(pool, row.sync)
                    sync.reach()  # the new trainer's first liveness check
                else:
                    pool = _pool(servers)
                    sync = WeightSync(pool, row.sync)
                    self._push(row, servers, sync, outcome)
                outcome.seconds = time.monotonic() - start
                outcome.quarantined = list(pool.quarantined)
                outcome.serving_after_failure = _serving(pool)
                self._repair(row, servers)
                self._restore(sync, outcome)
                outcome.serving_after_restore = _serving(pool)
            outcome.replies = clients.replies
            outcome.mismatches = self.find_mismatches(outcome)
            return outcome
        finally:
            if sync is not None:
                sync.close()
            for server in servers:
                server.kill()

    # ------------------------------------------------------------------ failures

    def _arm(self, row: Row, server: ForkedServer) -> None:
        if not row.path:
            return
        waits = {"slow": 0.5, "stop": 1.0, "trainer": 2.0, "late": 10.0}
        fault = Fault(
            path=row.path,
            action="slow" if row.how in waits else row.how,  # type: ignore[arg-type]
            at=row.at,  # type: ignore[arg-type]
            nth=row.nth,
            message=row.message,
            seconds=waits.get(row.how, 0.0),
        )
        server.arm(fault)

    def _push(self, row: Row, servers: Sequence[ForkedServer], sync: WeightSync, outcome: Outcome) -> None:
        server = servers[row.failing_server]
        seen = server.requests(row.path)  # connecting may have sent requests to this path
        self._arm(row, server)
        stopper = threading.Thread(target=self._stop_there, args=(row, server, seen))
        if row.how == "stop":
            stopper.start()
        try:
            report = sync.push(self.tensors[1])
            outcome.pushed_version = report and report.version
        except WeightSyncError as error:
            outcome.error, outcome.states = error, dict(error.server_weights)
        except ConfigError as error:
            outcome.error = error
        finally:
            if row.how == "stop":
                stopper.join()

    def _stop_there(self, row: Row, server: ForkedServer, seen: int) -> None:
        wait_until(lambda: server.requests(row.path) >= seen + row.nth, f"no request to {row.path}", 30)
        server.suspend()

    def _lose_trainer(self, row: Row, servers: Sequence[ForkedServer], outcome: Outcome) -> None:
        server = servers[row.failing_server]
        self._arm(row, server)
        trainer = self._processes.start_trainer([each.url for each in servers], self.models[1], CLIENT, row.sync)
        wait_until(lambda: server.requests(row.path) >= row.nth, f"no request to {row.path}", 30)
        trainer.kill()
        if row.sync.transport == "ipc":
            start = time.monotonic()
            for each in servers:
                SGLangClient(each.url, CLIENT).connect()  # asks the scheduler, too
            outcome.answers_after_s = time.monotonic() - start
            wait_until(lambda: not segments_of(trainer.pid), "a segment stayed in shared memory", 20)
        if row.path not in (JOIN, UPDATE):  # these may wait for the trainer forever
            wait_until(lambda: server.requests(row.path, answered=True) >= row.nth, "no answer", 10)

    # ------------------------------------------------------------------ outcome

    def _repair(self, row: Row, servers: list[ForkedServer]) -> None:
        server = servers[row.failing_server]
        if row.repair == "restart":
            server.kill()
            port = int(server.url.rsplit(":", 1)[1])
            servers[row.failing_server] = self._processes.start_server(replace(server.settings, port=port))
        elif row.repair == "resume":
            if row.how == "stop":
                server.resume()
            client = SGLangClient(server.url, CLIENT)
            wait_until(lambda: _answers(client), "the server does not answer", 20)

    def _restore(self, sync: WeightSync, outcome: Outcome) -> None:
        try:
            report = sync.push(self.tensors[2])
            outcome.restored_version = report and report.version
        except SGLangError as error:
            outcome.restore_error = error

    def find_mismatches(self, outcome: Outcome) -> list[str]:
        """The replies whose log-probs are not those of the weights that their version label names."""
        weights_of = {0: 0}
        attempted = outcome.pushed_version or 1
        if attempted != outcome.restored_version:
            weights_of[attempted] = 1
        if outcome.restored_version is not None:
            weights_of[outcome.restored_version] = 2
        mismatches = []
        for prompt, reply in outcome.replies:
            for span in reply.weight_spans:
                if span.start == span.end:
                    continue
                model = weights_of.get(version_number(span.version))
                if model is None:
                    mismatches.append(f"{reply.server} answered as version {span.version}")
                    continue
                scores = logprobs(self._signatures[model], [*prompt, *reply.output_ids], VOCAB_SIZE)[len(prompt) :]
                assert reply.output_logprobs is not None
                gaps = [abs((scores[i] or 0.0) - reply.output_logprobs[i]) for i in range(span.start, span.end)]
                if max(gaps) > 1e-4:
                    mismatches.append(f"{reply.server}: version {span.version} off by {max(gaps):.2g}")
        return mismatches


class BackgroundClients:
    """Other clients of the same servers: they generate all the time, without a pool and unaware of updates."""

    def __init__(self, servers: Sequence[ForkedServer]) -> None:
        self.replies: list[tuple[list[int], GenerateReply]] = []
        self._clients = [SGLangClient(server.url, CLIENT) for server in servers]
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._generate, args=(client,)) for client in self._clients]

    def __enter__(self) -> BackgroundClients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _generate(self, client: SGLangClient) -> None:
        number = 0
        while not self._closed.is_set():
            number += 1
            prompt = [1, 5, number % VOCAB_SIZE]
            request = build_generate([prompt], SamplingParams(max_new_tokens=20, ignore_eos=True))
            try:
                (reply,) = parse_generate(client.send(request, timeout_s=2), num_expected=1, server=client.url)
            except SGLangError:
                self._closed.wait(0.1)
            else:
                self.replies.append((prompt, reply))
                self._closed.wait(0.02)


def segments_of(pid: int) -> list[str]:
    """Shared memory segments of a trainer, by name."""
    return [path.name for path in Path("/dev/shm").glob(f"torchrl-*-*-*-{pid}.*")]


def _pool(servers: Sequence[ForkedServer]) -> SGLangPool:
    pool = SGLangPool([SGLangClient(server.url, CLIENT) for server in servers])
    pool.connect()
    return pool


def _answers(client: SGLangClient) -> bool:
    try:
        client.connect()
    except SGLangError:
        return False
    return True


def _serving(pool: SGLangPool) -> dict[str, int]:
    """The servers in the pool's routing, and the weight version each one answers with."""
    serving = {}
    for client in pool.healthy:
        try:
            (reply,) = SGLangPool([client]).generate([[7, 8]], SamplingParams(max_new_tokens=2), timeout_s=3)
            serving[client.url] = version_number(reply.weight_version)
        except SGLangError as error:
            serving[client.url] = repr(error)  # type: ignore[assignment]  # shown by the assertion that fails
    return serving


def run_all(rows: Sequence[Row], run: Callable[[Row], Outcome], workers: int) -> dict[str, Outcome | BaseException]:
    """Run rows concurrently: most of their time is waiting for time-outs."""
    results: dict[str, Outcome | BaseException] = {}
    todo = list(rows)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not todo:
                    return
                row = todo.pop(0)
            try:
                results[row.name] = run(row)
            except BaseException as error:  # noqa: BLE001  raised by the row's own test
                results[row.name] = error

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
