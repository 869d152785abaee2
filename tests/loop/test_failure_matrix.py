"""The failure matrix of a weight sync: every phase, every way to fail, one server or one of three, on fake processes.

All rows run side by side, once (they mostly wait for time-outs); each test looks at one row. Real servers have their
share of these cases in test_weight_sync.py.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.loop.failure_matrix_runner import (
    CLIENT,
    MAX_UPDATE_S,
    SYNC,
    TENSORS,
    UPDATE,
    BackgroundClients,
    MatrixRunner,
    Outcome,
    Row,
    run_all,
)
from tests.loop.forked_processes import ProcessFactory, wait_until
from torchrl_sglang import ConfigError, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_update_from_disk

NUM_BUCKETS = 10
MAX_ANSWER_S = 2.9
"""A server may still be in the call in which the trainer was killed, here made half a second long. No answer takes as
long as ``CLIENT.probe_timeout_s``, after which the client gives up."""
SHARED = replace(SYNC, groups="shared")  # by default gloo has a group per server
IPC = replace(SYNC, transport="ipc", stage="off")
STAGED_IPC = replace(SYNC, transport="ipc", stage="always")

# In the order of an update: name, path, which request to it, which one a whole trainer's life makes it.
PHASES: dict[str, tuple[str, int, int]] = {
    "joining the group": ("/init_weights_update_group", 1, 1),
    "the look at its load": ("/v1/loads", 1, 1),
    "the pause": ("/pause_generation", 1, 1),
    "the look at its version": ("/model_info", 3, 4),
    "the dirty mark": ("/update_weight_version", 1, 1),
    "begin": ("/begin_weight_update", 1, 2),
    "the first bucket": (UPDATE, 1, 1),
    "a bucket in the middle": (UPDATE, 4, 4),
    "the last bucket": (UPDATE, NUM_BUCKETS, NUM_BUCKETS),
    "end": ("/end_weight_update", 1, 1),
    "the new version": ("/update_weight_version", 2, 2),
    "continue": ("/continue_generation", 1, 1),
    "the probe": ("/generate", 1, 1),
    "the checksums": ("/weights_checker", 2, 2),  # the first ones are read before the update
}
PHASE_NAMES = list(PHASES)
FIRST_BUCKET, LAST_BUCKET = PHASE_NAMES.index("the first bucket"), PHASE_NAMES.index("the last bucket")


def expected_states(phase: str, how: str, servers: int, failing_server: int, *, together: bool) -> tuple[str, ...]:
    """What an update that fails at ``phase`` may leave behind."""
    index = PHASE_NAMES.index(phase)
    if index < FIRST_BUCKET:
        others, itself = "old", "old"
    else:
        others = "mixed" if index <= LAST_BUCKET and together else "new"
        itself = "mixed"
    if how in ("die", "stop"):
        itself = "stuck"
    return tuple(itself if i == failing_server else others for i in range(servers))


def failing(phase: str, how: str, *, servers: int = 1, failing_server: int = 0, sync: Any = SYNC, **more: Any) -> Row:
    path, nth, _ = PHASES[phase]
    number = "" if servers == 1 else f", server {failing_server + 1} of {servers}"
    groups = ", one group" if sync.groups == "shared" else ""
    if sync.transport == "ipc":
        path, groups = path_by_ipc(path), f", by ipc{', staged' if sync.stage == 'always' else ''}"
    return Row(
        name=f"{how} at {phase}{number}{groups}",
        path=path,
        nth=nth,
        how=how,
        servers=servers,
        failing_server=failing_server,
        sync=sync,
        states=expected_states(
            phase, how, servers, failing_server, together=sync.groups == "shared" and sync.transport != "ipc"
        ),
        repair="restart" if how in ("die", "stop") else "",
        **more,
    )


def path_by_ipc(path: str) -> str:
    return TENSORS if path == UPDATE else path


def orphaned(phase: str, *, servers: int = 1, failing_server: int = 0, sync: Any = SYNC) -> Row:
    path, _, nth = PHASES[phase]
    number = "" if servers == 1 else f", server {failing_server + 1} of {servers} behind"
    number += ", one group" if sync.groups == "shared" else ""
    if sync.transport == "ipc":
        path, number = path_by_ipc(path), f"{number}, by ipc{', staged' if sync.stage == 'always' else ''}"
    half_way = PHASE_NAMES.index("the dirty mark") <= PHASE_NAMES.index(phase) < PHASE_NAMES.index("the new version")
    return Row(
        name=f"trainer killed at {phase}{number}",
        path=path,
        nth=nth,
        how="trainer",
        servers=servers,
        failing_server=failing_server,
        dirty=half_way,
        sync=sync,
        # It retries the dead trainer's store until its time-out: torch's 30 minutes, or in a launched server ours.
        repair="restart" if phase == "joining the group" else "",
    )


def make_rows() -> Iterator[Row]:
    yield Row(name="nothing goes wrong")
    yield Row(name="nothing goes wrong, three servers", servers=3)
    yield Row(name="nothing goes wrong, three servers, one group", servers=3, sync=SHARED)
    yield Row(name="nothing goes wrong, before there were sessions", version="0.5.20")
    for phase in PHASES:
        for how in ("refuse", "die", "stop"):
            yield failing(phase, how)
        if phase not in ("the look at its load", "the look at its version"):
            yield replace(failing(phase, "slow"), states=None)
        yield orphaned(phase)
    for phase in ("begin", "a bucket in the middle", "end", "continue", "the checksums"):
        for how in ("refuse", "die", "stop"):
            for sync in (SHARED, SYNC):
                yield failing(phase, how, servers=3, failing_server=1, sync=sync)
    for how in ("refuse", "die", "stop"):
        for sync in (SHARED, SYNC):
            yield failing("joining the group", how, servers=3, failing_server=1, sync=sync)
    for phase in ("the first bucket", "a bucket in the middle"):
        yield failing(phase, "refuse", servers=3, failing_server=2, sync=SHARED)  # no child of the trainer in the tree
        # Server 1 hands the bytes on to server 3 in gloo's tree: it waits with it.
        stopped = failing(phase, "stop", servers=3, failing_server=2, sync=SHARED)
        yield replace(stopped, states=("stuck", "mixed", "stuck"))
        yield failing(phase, "stop", servers=3, failing_server=2)
        for sync in (SHARED, SYNC):
            yield orphaned(phase, servers=3, failing_server=1, sync=sync)
            yield orphaned(phase, servers=3, failing_server=2, sync=sync)
    yield from particular_rows()
    yield from rows_by_ipc()


def rows_by_ipc() -> Iterator[Row]:
    """Every phase once more, without a group, and each failure with one server of three."""
    yield Row(name="nothing goes wrong, by ipc", sync=IPC)
    yield Row(name="nothing goes wrong, three servers, by ipc, staged", servers=3, sync=STAGED_IPC)
    for phase in PHASES:
        if phase == "joining the group":
            continue
        index = PHASE_NAMES.index(phase)
        yield orphaned(phase, sync=STAGED_IPC if index % 2 else IPC)
        if FIRST_BUCKET <= index <= LAST_BUCKET:
            for how in ("refuse", "die", "stop"):
                yield failing(phase, how, sync=IPC)
            yield failing(phase, "refuse", sync=STAGED_IPC)
            yield replace(failing(phase, "slow", sync=IPC), states=None)
    for phase in ("begin", "a bucket in the middle", "end", "continue", "the checksums"):
        for how in ("refuse", "die", "stop"):
            yield failing(phase, how, servers=3, failing_server=1, sync=IPC)
    yield orphaned("a bucket in the middle", servers=3, failing_server=1, sync=IPC)
    middle: dict[str, Any] = {"path": TENSORS, "nth": 4, "sync": IPC}
    yield Row(name="half a reply to a bucket, by ipc", how="half_reply", states=("mixed",), **middle)
    yield Row(name="no reply to a bucket, by ipc", how="drop", at="handled", states=("mixed",), **middle)
    yield Row(
        name="dies while it reads a bucket, by ipc",
        how="die",
        at="received",
        states=("stuck",),
        repair="restart",
        **middle,
    )
    yield Row(name="stopped and thawed in a bucket, by ipc", how="stop", states=("stuck",), repair="resume", **middle)


def particular_rows() -> Iterator[Row]:
    """What doesn't come once per phase."""
    join, middle = PHASES["joining the group"][0], {"path": UPDATE, "nth": 4}
    yield Row(
        name="the group's name is taken",
        path=join,
        message="Failed to initialize custom process group: The specified group name has already been created",
        states=("old",),
        message_part="already been created",
    )
    yield Row(
        name="the trainer's address can't be reached",
        path=join,
        how="hang",
        states=("stuck",),
        message_part="127.0.0.1",
    )
    yield Row(name="a communicator that never forms", path=join, how="no_communicator", states=("stuck",))
    yield Row(
        name="a communicator that never forms, server 2 of 3",
        path=join,
        how="no_communicator",
        servers=3,
        failing_server=1,
        states=("old", "stuck", "old"),
        message_part="Can the servers reach that address?",
    )
    yield Row(
        name="refused before anything of the first bucket was loaded",
        path=UPDATE,
        message="Failed to receive weights: Unaligned received tensor",
        states=("old",),
    )
    yield Row(name="refused after a bucket was received", how="refuse", at="received", states=("mixed",), **middle)
    yield Row(
        name="dies after joining a broadcast", how="die", at="joined", states=("stuck",), repair="restart", **middle
    )
    yield Row(name="half a reply to a bucket", how="half_reply", states=("mixed",), **middle)
    yield Row(name="no reply to a bucket", how="drop", at="handled", states=("mixed",), **middle)
    yield Row(name="half a reply to continue", path="/continue_generation", how="half_reply", states=("mixed",))
    yield Row(name="no reply to continue", path="/continue_generation", how="drop", at="handled", states=("mixed",))
    yield Row(name="stopped and thawed in a bucket", how="stop", states=("stuck",), repair="resume", **middle)
    yield Row(
        name="stopped and thawed at begin", path="/begin_weight_update", how="stop", states=("stuck",), repair="resume"
    )
    yield Row(name="late with a bucket", how="late", at="scheduled", states=("stuck",), repair="resume", **middle)
    yield Row(
        name="a refusal with a fixed port, which the next group needs again",
        sync=replace(SYNC, master_port=free_port()),
        states=("mixed",),
        **middle,
    )
    yield Row(
        name="one of three dies and never comes back, one group",
        how="die",
        servers=3,
        failing_server=0,
        sync=SHARED,
        states=("stuck", "mixed", "mixed"),
        **middle,
    )
    yield Row(
        name="one of three dies and never comes back",
        how="die",
        servers=3,
        failing_server=0,
        states=("stuck", "new", "new"),
        **middle,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


ROWS = {row.name: row for row in make_rows()}


@pytest.fixture(scope="module")
def runner(make_model: Any, processes: ProcessFactory) -> MatrixRunner:
    return MatrixRunner(processes, [make_model(arch="llama", seed=seed) for seed in (0, 7, 8)])


@pytest.fixture(scope="module")
def outcomes(runner: MatrixRunner, request: pytest.FixtureRequest) -> dict[str, Outcome | BaseException]:
    """The rows that were asked for (``-k`` leaves out some)."""
    here = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    wanted = {params["name"] for params in here if "name" in params}
    return run_all([row for name, row in ROWS.items() if name in wanted], runner.run, workers=16)


@pytest.fixture
def outcome(name: str, outcomes: dict[str, Outcome | BaseException]) -> Outcome:
    result = outcomes[name]
    if isinstance(result, BaseException):
        raise result
    return result


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if row.sync.transport == "ipc" and row.how != "trainer" and "middle" not in name and "nothing" not in name
        else name
        for name, row in ROWS.items()
    ],
)
def test_a_failed_update_ends_in_time_says_what_is_where_serves_nothing_half_new_and_heals(
    name: str, outcome: Outcome
) -> None:
    row = ROWS[name]
    failing_server = outcome.urls[row.failing_server]
    assert outcome.seconds < MAX_UPDATE_S
    assert outcome.mismatches == [], "somebody was answered by weights that are not what their label says"

    if row.how == "trainer" and row.sync.transport == "ipc":
        assert outcome.answers_after_s < MAX_ANSWER_S
    if row.how == "trainer":
        assert outcome.quarantined == (outcome.urls if row.dirty else [])
    elif row.states is None:
        assert outcome.error is None
        assert outcome.pushed_version == 1
        assert list(outcome.serving_after_failure.values()) == [1] * row.servers
    else:
        assert isinstance(outcome.error, WeightUpdateError)
        assert failing_server in str(outcome.error)
        assert row.message_part in str(outcome.error)
        assert [outcome.states.get(url) for url in outcome.urls] == list(row.states)
        for url, state in zip(outcome.urls, row.states, strict=True):
            if state == "mixed":
                assert url not in outcome.serving_after_failure
            elif state != "stuck":
                assert outcome.serving_after_failure[url] == {"old": 0, "new": 1}[state]

    if row.repair == "" and row.how == "die":
        survivors = [url for url in outcome.urls if url != failing_server]
        assert outcome.restore_error is None
        assert outcome.serving_after_restore == dict.fromkeys(survivors, outcome.restored_version)
    else:
        assert outcome.restore_error is None
        assert outcome.serving_after_restore == dict.fromkeys(outcome.urls, outcome.restored_version)


def test_the_table_knows_how_many_buckets_there_are(runner: MatrixRunner) -> None:
    """Else "the last bucket" would be another, or none."""
    with_server = runner.serve()
    try:
        sync = WeightSync(SGLangPool([SGLangClient(with_server.url, CLIENT)]), SYNC)
        report = sync.push(runner.tensors[1])
        sync.close()
        assert report is not None
        assert report.num_buckets == NUM_BUCKETS
    finally:
        with_server.kill()


def test_the_other_client_detects_weights_other_than_its_label_says(runner: MatrixRunner) -> None:
    server = runner.serve()
    try:
        with BackgroundClients([server]) as clients:
            wait_until(lambda: clients.replies, "no reply", 20)
            # Model 1 under the name of model 0.
            SGLangClient(server.url).send(build_update_from_disk(str(runner.models[1]), version="default"))
            count = len(clients.replies)
            wait_until(lambda: len(clients.replies) > count + 2, "no reply", 20)
        mismatches = runner.find_mismatches(Outcome(replies=clients.replies))
        assert mismatches
        assert all("version default off by" in mismatch for mismatch in mismatches)
        assert runner.find_mismatches(Outcome(replies=clients.replies[:1])) == []
    finally:
        server.kill()


def test_a_port_in_use_and_an_address_of_another_machine_are_refused_by_name(runner: MatrixRunner) -> None:
    server = runner.serve()
    try:
        pool = SGLangPool([SGLangClient(server.url, CLIENT)])
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            sync = WeightSync(pool, replace(SYNC, master_port=port))
            with pytest.raises(ConfigError, match=rf"can't listen on 127.0.0.1:{port}.*in use"):
                sync.push(runner.tensors[1])
        report = sync.push(runner.tensors[1])
        assert report is not None
        assert report.version == 1
        sync.close()
        elsewhere = WeightSync(pool, replace(SYNC, master_address="203.0.113.7"))
        with pytest.raises(ConfigError, match=r"203\.0\.113\.7.*master_address"):
            elsewhere.push(runner.tensors[1])
        assert not pool.quarantined
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("version", "next_number"), [("7@other", 8), ("dirty-8@other", 8), ("somebody-elses-experiment", 1)]
)
def test_a_session_that_another_trainer_left_open_is_closed_and_its_count_goes_on(
    runner: MatrixRunner, version: str, next_number: int
) -> None:
    server = runner.serve()
    try:
        server.set_state(session_open=True, weight_version=version)
        pool = SGLangPool([SGLangClient(server.url, CLIENT)])
        pool.connect()
        assert list(pool.quarantined) == ([server.url] if "dirty" in version else [])
        sync = WeightSync(pool, replace(SYNC, takeover=True))
        report = sync.push(runner.tensors[1])
        sync.close()
        assert report is not None
        assert report.version == next_number
        assert not pool.quarantined
        assert server.requests("/end_weight_update") == 2  # the other's, then ours
    finally:
        server.kill()


def test_a_left_over_session_makes_a_server_mixed_for_an_update_that_fails_before_the_first_bucket(
    runner: MatrixRunner,
) -> None:
    from tests.fake_sglang import Fault

    server = runner.serve()
    try:
        server.set_state(session_open=True)
        pool = SGLangPool([SGLangClient(server.url, CLIENT)])
        sync = WeightSync(pool, replace(SYNC, takeover=True))
        server.arm(Fault(path="/end_weight_update", action="refuse"))
        with pytest.raises(WeightUpdateError) as caught:
            sync.push(runner.tensors[1])
        assert caught.value.server_weights == {server.url: "mixed"}
        assert server.url in pool.quarantined
        assert sync.push(runner.tensors[1]) is not None
        assert not pool.quarantined
        sync.close()
    finally:
        server.kill()


def test_no_thread_is_left_once_the_operations_have_timed_out(outcomes: dict[str, Outcome | BaseException]) -> None:
    def ours() -> list[str]:
        return [
            t.name
            for t in threading.enumerate()
            if t.name.startswith(("broadcast-", "join-", "http", "drop-", "destroy-", "sglang-"))
        ]

    start = time.monotonic()
    while ours() and time.monotonic() < start + 15:
        time.sleep(0.1)
    assert ours() == []
