"""Weights to a real SGLang server: through a collector, from every form a trainer may have, refused, and failed.

What needs other servers than the shared one is in test_weight_sync_fleet.py, what has requests in flight in
test_weight_sync_in_flight.py, what has no process group in test_transports.py, and every other failure, on fake
servers, in test_failure_matrix.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torchrl.collectors
from tensordict import TensorDict, TensorDictBase
from torchrl.modules.llm import TransformersWrapper
from transformers import AutoTokenizer

from tests.loop.forked_processes import ProcessFactory
from tests.loop.sync_cases import PROMPTS, assert_serves, group_names, load, make_collector
from torchrl_sglang import (
    ClientConfig,
    ConfigError,
    SamplingParams,
    SGLangWeightSyncScheme,
    SyncConfig,
    WeightCoverageError,
    WeightSync,
    WeightSyncError,
    WeightUpdateError,
)
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.protocol.control import build_begin_update, build_destroy_group, build_set_version
from torchrl_sglang.server import SGLangServer

SMALL_BUCKETS = SyncConfig(transport="broadcast", stage="off", bucket_bytes=60_000, verify="full")


@pytest.fixture(scope="module")
def model_a(tiny_llama: Path) -> Any:
    return load(tiny_llama)


@pytest.fixture
def model_b(tiny_llama_b: Path) -> Any:
    return load(tiny_llama_b)


@pytest.fixture
def sync(url: str) -> Iterator[WeightSync]:
    with closing(WeightSync(SGLangPool([SGLangClient(url)]), SMALL_BUCKETS)) as made:
        yield made


# ------------------------------------------------------------------------------------------- through a collector


def versions_in(batch: TensorDictBase) -> set[int]:
    return {int(v) for row in batch.reshape(-1) for v in row["generation"].weight_version.reshape(-1)}


# torchrl 0.12 knows both names, later releases the first.
COLLECTORS = [name for name in ("Collector", "SyncDataCollector") if hasattr(torchrl.collectors, name)]


@pytest.mark.torchrl
@pytest.mark.parametrize("kind", COLLECTORS)
def test_a_collector_updates_the_server_again_and_again(
    url: str, tiny_llama: Path, model_a: Any, model_b: Any, kind: str
) -> None:
    scheme = SGLangWeightSyncScheme(url)
    collector = make_collector(url, tiny_llama, scheme, getattr(torchrl.collectors, kind))
    try:
        batches = iter(collector)
        assert versions_in(next(batches)) == {0}
        assert_serves(url, model_a, version=0)  # nothing was sent yet
        for version, model in enumerate((model_b, model_a), start=1):
            collector.update_policy_weights_(model)
            assert_serves(url, model, version)
            assert versions_in(next(batches)) == {version}
        assert scheme.last_report is not None
        assert scheme.last_report.max_logprob_gap < 1e-4  # verification called the model itself
        with pytest.raises(ConfigError, match=r"update_policy_weights_\(model\)"):
            collector.update_policy_weights_()
        assert_serves(url, model_a, version=2)
    finally:
        collector.shutdown()


@pytest.mark.torchrl
def test_a_scheme_with_a_model_sends_it_before_the_first_rollout(url: str, tiny_llama: Path, model_b: Any) -> None:
    collector = make_collector(url, tiny_llama, SGLangWeightSyncScheme(url, model=model_b))
    try:
        assert versions_in(next(iter(collector))) == {1}
        assert_serves(url, model_b, version=1)
    finally:
        collector.shutdown()


# ------------------------------------------------------------------------------------------------- what may be sent


def as_wrapper(model: Any, folder: Path) -> Any:
    return TransformersWrapper(
        model, tokenizer=AutoTokenizer.from_pretrained(folder), generate=False, input_mode="tokens"
    )


FORMS: dict[str, Callable[[Any, Path], Any]] = {
    "TransformersWrapper": as_wrapper,
    "nested TensorDict": lambda model, folder: TensorDict.from_module(as_wrapper(model, folder)).data,
    "state dict": lambda model, _: model.state_dict(),
    "state dict with prefixes": lambda model, _: {f"actor.module.{k}": v for k, v in model.state_dict().items()},
    "function that makes iterators": lambda model, _: lambda: iter(model.state_dict().items()),
    "function, in another order": lambda model, _: lambda: reversed(model.state_dict().items()),
    "iterator, in another order": lambda model, _: reversed(model.state_dict().items()),
    "iterator": lambda model, _: iter(model.state_dict().items()),
    "torch.compile": lambda model, _: torch.compile(model),
}


@pytest.mark.torchrl
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_arrives(sync: WeightSync, url: str, model_b: Any, tiny_llama: Path, form: str) -> None:
    report = sync.push(FORMS[form](model_b, tiny_llama))
    assert report is not None
    assert report.num_bytes == sum(p.nbytes for p in model_b.parameters())
    assert report.server_weights == {url: "new"}
    assert_serves(url, model_b, version=1)


def test_a_model_in_half_precision_is_cast_by_the_server(url: str, model_b: Any, tiny_llama_b: Path) -> None:
    half = load(tiny_llama_b).bfloat16()
    for wide, narrow in zip(model_b.parameters(), half.parameters(), strict=True):
        wide.data.copy_(narrow)
    with closing(WeightSync(SGLangPool([SGLangClient(url)]), SyncConfig())) as sync:
        report = sync.push(half)
    assert report is not None
    assert report.num_bytes == sum(p.nbytes for p in half.parameters())
    assert_serves(url, model_b, version=1)


def test_an_adapter_arrives_merged_and_stays_as_it_was(sync: WeightSync, url: str, tiny_llama: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(load(tiny_llama), config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sync.push(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_serves(url, model.eval(), version=1)


def test_two_ranks_of_fsdp_send_the_whole_model(
    url: str, processes: ProcessFactory, tiny_llama: Path, model_a: Any
) -> None:
    ranks = processes.start_sharded_trainer(2, url, tiny_llama)
    reports = [rank.read() for rank in ranks]
    assert [report["versions"] for report in reports] == [[1, 2], [None, None]]
    assert [report["default_group"] for report in reports] == [2, 2]
    trained = load(tiny_llama)
    trained.load_state_dict(torch.load(reports[0]["model"]))
    assert not torch.equal(trained.lm_head.weight, model_a.lm_head.weight)
    assert_serves(url, trained, version=2)


# ------------------------------------------------------------------------------------------------- what is refused


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: {k: v for k, v in state.items() if k != name}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: {k: change(v) if k == name else v for k, v in state.items()}


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "unknown name": (lambda s: {**s, "model.norn.weight": s[NORM].clone()}, WeightCoverageError, "model.norn.weight"),
    "missing name": (without(NORM), WeightCoverageError, "1 missing.*\n.*model.norm.weight"),
    "wrong shape": (changed(NORM, lambda t: t[:-1]), WeightCoverageError, r"model.norm.weight.*\(63,\) sent, \(64,\)"),
    "integers": (changed(EMBED, lambda t: t.int()), WeightCoverageError, "model.embed_tokens.weight.*int32"),
    "NaN": (changed(EMBED, lambda t: t.index_fill(0, torch.tensor([7]), float("nan"))), WeightCoverageError, EMBED),
    "infinity": (changed(NORM, lambda t: t / 0), WeightCoverageError, f"{NORM}: 64 of 64 elements"),
    "nothing": (lambda s: None, ConfigError, "NoneType"),
    "an empty dict": (lambda s: {}, ConfigError, "hold no tensor"),
    "a number": (lambda s: 3, ConfigError, "int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_touches_nothing(
    sync: WeightSync, url: str, model_a: Any, model_b: Any, case: str
) -> None:
    spoil, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        sync.push(spoil(model_b.state_dict()))
    if isinstance(caught.value, WeightSyncError):
        assert set(caught.value.server_weights.values()) <= {"old"}
    client = SGLangClient(url)
    assert client.connect().weight_version == "default"
    assert_serves(url, model_a, version=0)
    assert sync.push(model_b) is not None


def test_an_iterator_that_turns_out_bad_half_way_leaves_the_server_out_of_service_until_a_good_push(
    sync: WeightSync, url: str, model_b: Any
) -> None:
    """It can be read only once, so there is no looking at it before."""
    items = list(model_b.state_dict().items())
    items[-2] = (items[-2][0], items[-2][1] * float("nan"))
    with pytest.raises(WeightSyncError, match="NaN") as caught:
        sync.push(iter(items))
    assert caught.value.server_weights == {url: "mixed"}
    assert SGLangClient(url).connect().weight_version.startswith("dirty-1@")
    stranger = SGLangPool([SGLangClient(url)])
    stranger.connect()
    assert list(stranger.quarantined) == [url]
    sync.push(model_b)
    assert_serves(url, model_b, version=1)


def test_a_server_that_answers_with_nan_is_taken_out_of_service(url: str, model_a: Any, tiny_llama: Path) -> None:
    broken = load(tiny_llama)
    broken.model.norm.weight.data[3] = float("nan")
    pool = SGLangPool([SGLangClient(url)])
    with closing(WeightSync(pool, SyncConfig(check_values=False))) as sync:
        with pytest.raises(WeightUpdateError, match=f"{url} differs from .* by nan") as caught:
            sync.push(broken)
        assert caught.value.server_weights == {url: "mixed"}
        assert url in pool.quarantined
        assert SGLangClient(url).connect().weight_version.startswith("dirty-1@")
        sync.push(model_a)
    assert_serves(url, model_a, version=2)


def test_a_model_that_computes_something_else_is_found_out_and_one_that_cannot_be_asked_says_so(
    url: str, model_a: Any, tiny_llama: Path
) -> None:
    other = load(tiny_llama)
    other.config.rms_norm_eps = 0.5
    for part in other.modules():
        if hasattr(part, "variance_epsilon"):
            part.variance_epsilon = 0.5
    silent = load(tiny_llama)
    silent.forward = lambda: None
    pool = SGLangPool([SGLangClient(url)])
    with closing(WeightSync(pool)) as sync:
        with pytest.raises(WeightUpdateError, match="compute what the served checkpoint's architecture does"):
            sync.push(other)
        assert url in pool.quarantined
        with pytest.raises(WeightUpdateError, match=r"can't be called.*verify='off'") as caught:
            sync.push(silent)
        assert caught.value.server_weights == {url: "new"}
        assert url not in pool.quarantined
    assert_serves(url, model_a, version=2)


def test_one_tensor_goes_only_to_a_server_that_holds_this_trainers_others(
    url: str, model_a: Any, model_b: Any, tiny_llama: Path
) -> None:
    mixture = load(tiny_llama)
    mixture.model.norm.weight.data.copy_(model_b.model.norm.weight)
    ours, others = (WeightSync(SGLangPool([SGLangClient(url)]), SMALL_BUCKETS) for _ in range(2))
    with closing(ours), closing(others):
        ours.push({NORM: model_b.model.norm.weight}, partial=True)
        assert_serves(url, mixture, version=1)
        others.push(model_b)
        with pytest.raises(ConfigError, match="which this trainer did not send"):
            ours.push({NORM: model_a.model.norm.weight}, partial=True)
        ours.push(model_a, version=7)
        ours.push({NORM: model_b.model.norm.weight}, partial=True)
        assert_serves(url, mixture, version=8)


# -------------------------------------------------------------------------------------------------- what goes wrong


def test_a_server_that_lost_its_group_says_no_at_once_keeps_serving_and_takes_the_next_push(
    sync: WeightSync, url: str, model_a: Any, model_b: Any
) -> None:
    client = SGLangClient(url)
    of_dead_trainers = set(group_names(client))  # which nobody was left to take down
    sync.push(model_a)
    (name,) = set(group_names(client)) - of_dead_trainers
    client.send(build_destroy_group(name))
    with pytest.raises(WeightUpdateError, match=f"{url} failed while receiving weights.*Group {name} not in") as caught:
        sync.push(model_b)
    assert caught.value.server_weights == {url: "old"}
    assert_serves(url, model_a, version=1)
    sync.push(model_b)
    assert_serves(url, model_b, version=2)
    sync.close()
    assert set(group_names(client)) == of_dead_trainers


@pytest.mark.parametrize("inside_a_broadcast", [False, True])
def test_after_a_trainer_died_in_the_middle_the_next_one_finds_the_mark_and_heals(
    url: str, processes: ProcessFactory, tiny_llama_b: Path, model_a: Any, inside_a_broadcast: bool
) -> None:
    trainer = processes.start_stalled_trainer(url, tiny_llama_b, inside_a_broadcast=inside_a_broadcast)
    assert trainer.read() == ("announced" if inside_a_broadcast else "half of the tensors sent")
    trainer.kill()
    pool = SGLangPool([SGLangClient(url)])
    pool.connect()
    assert "dirty-1@" in pool.quarantined[url]
    # The mark names no process of this host, so it must stay the same for an update's whole deadline.
    with closing(WeightSync(pool, replace(SMALL_BUCKETS, fixed_timeout_s=12))) as sync:
        report = sync.push(model_a)
    assert report is not None
    assert report.version == 1
    assert not pool.quarantined
    assert_serves(url, model_a, version=1)


def test_a_session_that_was_left_open_is_closed_on_takeover_and_everything_sent(url: str, model_b: Any) -> None:
    client = SGLangClient(url)
    client.send(build_set_version("4@somebody"))
    client.send(build_begin_update())
    refused = pytest.raises(WeightUpdateError, match="open that another program has opened.*takeover=True")
    with closing(WeightSync(SGLangPool([SGLangClient(url)]), SMALL_BUCKETS)) as sync, refused:
        sync.push(model_b)
    with closing(WeightSync(SGLangPool([SGLangClient(url)]), replace(SMALL_BUCKETS, takeover=True))) as sync:
        sync.push(model_b)
        assert_serves(url, model_b, version=5)


@pytest.fixture
def scheduler(pristine_server: SGLangServer) -> Iterator[psutil.Process]:
    """The process of the server that runs the model, going on when the test is over."""
    children = psutil.Process(pristine_server.pid).children(recursive=True)
    (found,) = [child for child in children if "scheduler" in " ".join(child.cmdline())]
    try:
        yield found
    finally:
        found.resume()


@pytest.mark.slow
def test_a_scheduler_that_stops_in_the_middle_is_named_in_time_and_heals_when_it_goes_on(
    url: str, scheduler: psutil.Process, model_a: Any, model_b: Any
) -> None:
    client = SGLangClient(url, ClientConfig(probe_timeout_s=5, control_timeout_s=5, update_timeout_s=10))
    limits = {"group_timeout_s": 5, "bucket_timeout_s": 2, "fixed_timeout_s": 20}
    config = SyncConfig(transport="broadcast", stage="off", bucket_bytes=30_000, **limits)
    names = list(model_b.state_dict())

    def stopping() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in model_b.state_dict().items():
            if name == names[len(names) // 2]:
                os.kill(scheduler.pid, signal.SIGSTOP)
            yield name, tensor

    with closing(WeightSync(SGLangPool([client]), config)) as sync:
        with pytest.raises(WeightUpdateError, match=f"no reply from {url}") as caught:
            sync.push(stopping())
        assert caught.value.server_weights == {url: "stuck"}
        with pytest.raises(WeightUpdateError, match="no server can be reached") as caught:
            sync.push(model_a)
        assert caught.value.server_weights == {url: "stuck"}
        scheduler.resume()
        sync.push(model_a)
    assert_serves(url, model_a, version=1)


def test_a_healthy_server_is_free_again_after_a_group_that_never_formed(
    url: str, processes: ProcessFactory, tiny_llama: Path, model_b: Any
) -> None:
    """One member is frozen: the real server must not be left waiting at the trainer's store."""
    from tests.fake_sglang import FakeSettings, Fault

    frozen = processes.start_server(FakeSettings(model_path=tiny_llama))
    frozen.arm(Fault(path="/init_weights_update_group", action="hang"))
    try:
        pool = SGLangPool([SGLangClient(url), SGLangClient(frozen.url)])
        config = SyncConfig(transport="broadcast", group_timeout_s=3)
        with closing(WeightSync(pool, config)) as sync:
            with pytest.raises(WeightUpdateError, match=f"{frozen.url} did not arrive") as caught:
                sync.push(model_b)
            assert caught.value.server_weights == {url: "old", frozen.url: "stuck"}
        assert pool.generate(PROMPTS, SamplingParams(max_new_tokens=1), timeout_s=10)
    finally:
        frozen.kill()
    with closing(WeightSync(SGLangPool([SGLangClient(url)]))) as sync:
        sync.push(model_b)
    assert_serves(url, model_b, version=1)


# ------------------------------------------------------------------------------------------------------ nothing grows


def usage(pids: list[int]) -> dict[str, int]:
    """Descriptors and threads of some processes, and what lies in shared memory."""
    processes = [psutil.Process(pid) for pid in pids]
    return {
        "descriptors": sum(process.num_fds() for process in processes),
        "threads": sum(process.num_threads() for process in processes),
        "shared memory": len(list(Path("/dev/shm").iterdir())),
    }


@pytest.mark.parametrize("times", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_grows_on_either_side_over_many_syncs(
    pristine_server: SGLangServer, sync: WeightSync, model_a: Any, model_b: Any, times: int
) -> None:
    assert pristine_server.pid is not None
    server = [pristine_server.pid, *(c.pid for c in psutil.Process(pristine_server.pid).children(recursive=True))]
    for _ in range(3):
        sync.push(model_a)
    before, resident = (usage(server), usage([os.getpid()])), resident_bytes([*server, os.getpid()])
    for index in range(times):
        sync.push((model_b, model_a)[index % 2])
    after = usage(server), usage([os.getpid()])
    for side_before, side_after in zip(before, after, strict=True):
        for what, count in side_before.items():
            # Connections come and go, by a few; one that stays behind per sync would be `times`.
            assert side_after[what] - count < 10, f"{what}: {count} before, {side_after[what]} after {times} syncs"
    if times >= 200:
        assert resident_bytes([*server, os.getpid()]) - resident < 100 * sum(p.nbytes for p in model_a.parameters())


def resident_bytes(pids: list[int]) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return sum(psutil.Process(pid).memory_info().rss for pid in pids)
    return 0
