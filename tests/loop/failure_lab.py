"""Runs one row of the failure matrix on fake servers and records what happened, for test_failure_matrix.py to judge.

In every row other clients keep generating while the update goes wrong: each of their answers must have been computed
entirely by weights that its version label names. The fake's log-probs are a function of all the weights it holds, so a
single stale or half-new tensor shows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.fake_sglang import FakeSettings, Fault, logprobs, signature
from tests.fake_sglang.model import read_checkpoint
from tests.loop.forked import ForkedServer, Nursery, wait_until
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
CLIENT = ClientConfig(
    connect_timeout_s=3, probe_timeout_s=3, control_timeout_s=3, update_timeout_s=4, generate_timeout_s=10
)
SYNC = SyncConfig(bucket_bytes=60_000, group_timeout_s=4, bucket_timeout_s=3, fixed_timeout_s=12, verify="full")
STATED_S = 40.0
"""What the time-outs above add up to at worst: to look for the servers (3), to form the group (4), the update itself
(12), the proof (4) and, for each of the last three, what leaving a server that does not answer costs (3 to 6)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: what goes wrong, and what has to come of it.

    Attributes:
        name: in words.
        path: request path at which it goes wrong.
        nth: which request to that path, counted from the beginning of the first push.
        how: ``refuse``, ``die``, ``drop``, ``half_reply``, ``no_communicator``, ``hang``: a fault armed at the server.
            ``slow``: it waits half a second, and all is well. ``late``: it waits longer than we do, and comes back.
            ``stop``: the process gets SIGSTOP there. ``trainer``: the *trainer* gets SIGKILL while the server is there.
        at: point in the request's life, see :class:`Fault`.
        message: what a refusal says.
        servers: number of servers.
        struck: index of the one that fails.
        version: SGLang version the servers behave like.
        sync: settings.
        states: expected ``server_weights`` after the failure, server by server; ``None``: the push succeeds.
        says: part of the error's message, besides the struck server's URL.
        dirty: the servers are marked as half-updated when a new trainer arrives.
        cure: what happens before the second push: ``restart`` (at the same address), ``thaw``, or nothing.
    """

    name: str
    path: str = ""
    nth: int = 1
    how: str = "refuse"
    at: str = "arrived"
    message: str = "refused by the fake server"
    servers: int = 1
    struck: int = 0
    version: str = "0.5.23"
    sync: SyncConfig = SYNC
    states: tuple[str, ...] | None = None
    says: str = ""
    dirty: bool = False
    cure: str = ""


@dataclass
class Outcome:
    """What happened in a row."""

    urls: list[str] = field(default_factory=list)
    error: SGLangError | None = None
    states: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    pushed_version: int | None = None
    serving_after_failure: dict[str, int] = field(default_factory=dict)
    quarantined: list[str] = field(default_factory=list)
    heal_error: SGLangError | None = None
    healed_version: int | None = None
    serving_after_heal: dict[str, int] = field(default_factory=dict)
    replies: list[tuple[list[int], GenerateReply]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Lab:
    """Models, processes, and the way a row is run."""

    def __init__(self, nursery: Nursery, models: Sequence[Path]) -> None:
        self._nursery = nursery
        self.models = list(models)
        self.tensors = [read_checkpoint(model) for model in models]
        self._signatures = [signature(tensors) for tensors in self.tensors]

    def serve(self) -> ForkedServer:
        """A server with model 0."""
        return self._nursery.serve(FakeSettings(model_path=self.models[0]))

    def run(self, row: Row) -> Outcome:
        """First push (model 1) goes wrong, the second (model 2) heals; model 0 is what the servers start with."""
        settings = FakeSettings(model_path=self.models[0], version=row.version)
        servers = [self._nursery.serve(settings) for _ in range(row.servers)]
        outcome = Outcome(urls=[server.url for server in servers])
        sync: WeightSync | None = None
        try:
            # The probe of a proof and a bystander's request look alike to a fault.
            with Bystander(servers if row.path != "/generate" else []) as bystander:
                start = time.monotonic()
                if row.how == "trainer":
                    self._lose_trainer(row, servers)
                    pool = SGLangPool([SGLangClient(server.url, CLIENT) for server in servers])
                    sync = WeightSync(pool, row.sync)
                    sync.reach()  # the new trainer's first look
                else:
                    pool = _pool(servers)
                    sync = WeightSync(pool, row.sync)
                    self._push(row, servers, sync, outcome)
                outcome.seconds = time.monotonic() - start
                outcome.quarantined = list(pool.quarantined)
                outcome.serving_after_failure = _serving(pool)
                self._cure(row, servers)
                self._heal(sync, outcome)
                outcome.serving_after_heal = _serving(pool)
            outcome.replies = bystander.replies
            outcome.complaints = self.audit(outcome)
            return outcome
        finally:
            if sync is not None:
                sync.close()
            for server in servers:
                server.kill()

    # ------------------------------------------------------------------ what goes wrong

    def _arm(self, row: Row, server: ForkedServer) -> None:
        if not row.path:
            return
        waits = {"slow": 0.5, "stop": 1.0, "trainer": 0.5, "late": 10.0}
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
        server = servers[row.struck]
        seen = server.requests(row.path)  # connecting has asked this or that before
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
        wait_until(lambda: server.requests(row.path) >= seen + row.nth, f"no {row.path} came", 30)
        server.stop()

    def _lose_trainer(self, row: Row, servers: Sequence[ForkedServer]) -> None:
        server = servers[row.struck]
        self._arm(row, server)
        trainer = self._nursery.train([each.url for each in servers], self.models[1], CLIENT, row.sync)
        wait_until(lambda: server.requests(row.path) >= row.nth, f"no {row.path} came", 30)
        trainer.kill()
        if row.path not in (JOIN, UPDATE):  # these may wait for ever for the trainer
            wait_until(lambda: server.requests(row.path, answered=True) >= row.nth, "no answer", 10)

    # ------------------------------------------------------------------ what comes of it

    def _cure(self, row: Row, servers: list[ForkedServer]) -> None:
        server = servers[row.struck]
        if row.cure == "restart":
            server.kill()
            port = int(server.url.rsplit(":", 1)[1])
            servers[row.struck] = self._nursery.serve(replace(server.settings, port=port))
        elif row.cure == "thaw":
            if row.how == "stop":
                server.go_on()
            client = SGLangClient(server.url, CLIENT)
            wait_until(lambda: _answers(client), "it does not come back", 20)

    def _heal(self, sync: WeightSync, outcome: Outcome) -> None:
        try:
            report = sync.push(self.tensors[2])
            outcome.healed_version = report and report.version
        except SGLangError as error:
            outcome.heal_error = error

    def audit(self, outcome: Outcome) -> list[str]:
        """Every answer whose log-probs are not those of the weights that its label names."""
        weights_of = {0: 0}
        tried = outcome.pushed_version or 1
        if tried != outcome.healed_version:
            weights_of[tried] = 1
        if outcome.healed_version is not None:
            weights_of[outcome.healed_version] = 2
        complaints = []
        for prompt, reply in outcome.replies:
            for span in reply.weight_spans:
                if span.start == span.end:
                    continue
                model = weights_of.get(version_number(span.version))
                if model is None:
                    complaints.append(f"{reply.server} answered as version {span.version}")
                    continue
                scores = logprobs(self._signatures[model], [*prompt, *reply.output_ids], VOCAB_SIZE)[len(prompt) :]
                assert reply.output_logprobs is not None
                gaps = [abs((scores[i] or 0.0) - reply.output_logprobs[i]) for i in range(span.start, span.end)]
                if max(gaps) > 1e-4:
                    complaints.append(f"{reply.server}: version {span.version} off by {max(gaps):.2g}")
        return complaints


class Bystander:
    """Other clients of the same servers: they generate without a break, past any pool, and know nothing of updates."""

    def __init__(self, servers: Sequence[ForkedServer]) -> None:
        self.replies: list[tuple[list[int], GenerateReply]] = []
        self._clients = [SGLangClient(server.url, CLIENT) for server in servers]
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(client,)) for client in self._clients]

    def __enter__(self) -> Bystander:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, client: SGLangClient) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            prompt = [1, 5, number % VOCAB_SIZE]
            request = build_generate([prompt], SamplingParams(max_new_tokens=20, ignore_eos=True))
            try:
                (reply,) = parse_generate(client.send(request, timeout_s=2), num_expected=1, server=client.url)
            except SGLangError:
                self._over.wait(0.1)
            else:
                self.replies.append((prompt, reply))
                self._over.wait(0.02)


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
    """Which servers take requests through the pool right now, and as which version they answer."""
    serving = {}
    for client in pool.healthy:
        try:
            (reply,) = SGLangPool([client]).generate([[7, 8]], SamplingParams(max_new_tokens=2), timeout_s=3)
            serving[client.url] = version_number(reply.weight_version)
        except SGLangError as error:
            serving[client.url] = repr(error)  # type: ignore[assignment]  # shown by the failing assertion
    return serving


def run_all(rows: Sequence[Row], run: Callable[[Row], Outcome], workers: int) -> dict[str, Outcome | BaseException]:
    """Run rows side by side: most of their time is waiting for time-outs."""
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
