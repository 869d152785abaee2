"""Verification by checksums: what is compared, what is learned of layouts, what raises an alarm and what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fake_sglang import FakeServer, FakeSettings, Fault
from tests.fake_sglang.model import read_checkpoint
from tests.stale_tensors import keep_old, reload_on_one_server
from torchrl_sglang import ConfigError, SyncConfig, SyncReport, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.weights.buckets.layout import Bucket, plan_buckets
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.checksums import expected
from torchrl_sglang.weights.checksums.rules import Finding, LayoutRules, TensorId
from torchrl_sglang.weights.checksums.sampling import SampleChooser, skip_list
from torchrl_sglang.weights.checksums.server_tensors import FusedUnit, fused_units

SMALL = SyncConfig(bucket_bytes=60_000, verify_atol=1e9)  # the fake's log-probs are no model's
PROJECTIONS = "model.layers.1.self_attn.{}_proj.weight"
FUSED = PROJECTIONS.format("qkv")

Make = Callable[..., FakeServer]


@pytest.fixture
def old(tiny_llama: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(tiny_llama)


@pytest.fixture
def new(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * (1 + 1 / 128) for name, tensor in old.items()}


def sync_with(*servers: FakeServer, config: SyncConfig = SMALL) -> Any:
    return closing(WeightSync(SGLangPool([SGLangClient(server.url) for server in servers]), config))


def pushed(sync: WeightSync, weights: Any, **options: Any) -> SyncReport:
    report = sync.push(weights, **options)
    assert report is not None
    return report


def skips(server: FakeServer) -> list[list[str]]:
    """What each call for checksums left out."""
    bodies = [event["body"] for event in server.events if event["path"] == "/weights_checker"]
    return [body.get("skip_tensor_list", []) for body in bodies]


# ------------------------------------------------------------------------------------------------ on fake servers


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_of_a_small_model_is_compared_on_every_rank(
    make_model: Callable[..., Path], new: dict[str, torch.Tensor], tp_size: int, dtype: str
) -> None:
    """Also those that the server casts."""
    settings = FakeSettings(model_path=make_model(arch="llama", dtype=dtype), tp_size=tp_size)
    with FakeServer(settings) as server, sync_with(server) as sync:
        for _ in range(2):
            report = pushed(sync, new)
            assert (report.num_checksums, report.not_compared) == (15 * tp_size, {})


@pytest.mark.parametrize("verify", ["probe", "full"])
@pytest.mark.parametrize(
    ("missed", "tensor"),
    [
        (lambda name, bucket: True, "model.embed_tokens.weight"),
        (lambda name, bucket: bucket == 3, "model.layers."),
        (lambda name, bucket: name == PROJECTIONS.format("v"), FUSED),
    ],
    ids=["all", "one bucket", "one of three that are fused"],
)
def test_the_only_server_is_compared_with_what_was_sent(
    make: Make, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], verify: Any, missed: Any, tensor: str
) -> None:
    server = make()
    config = SyncConfig(bucket_bytes=60_000, verify=verify, verify_atol=1e9)
    with sync_with(server, config=config) as sync:
        keep_old(sync, old, missed)
        with pytest.raises(WeightUpdateError, match=f"{server.url} does not hold what was sent, .*{tensor}") as caught:
            sync.push(new)
        assert caught.value.server_weights == {server.url: "mixed"}


def test_only_the_server_that_kept_old_values_is_quarantined(
    make: Make, new: dict[str, torch.Tensor], tiny_llama: Path
) -> None:
    """Servers of one rank and of two: their hashes can't be compared with each other's."""
    good, bad = make(), make(tp_size=2)
    with sync_with(good, bad) as sync:
        assert pushed(sync, new).num_checksums == 15 + 30
        reload_on_one_server(sync, bad.url, tiny_llama)
        with pytest.raises(WeightUpdateError, match=f"{bad.url} does not hold what was sent") as caught:
            sync.push(new)
        assert caught.value.server_weights == {good.url: "new", bad.url: "mixed"}


def test_tensors_that_did_not_change_raise_no_alarm(make: Make, old: dict[str, torch.Tensor]) -> None:
    with sync_with(make()) as sync:
        for _ in range(3):
            assert pushed(sync, old).not_compared == {}


@pytest.mark.parametrize("form", ["iterator", "in another order", "module"])
def test_every_form_of_weights_is_compared(
    make: Make, new: dict[str, torch.Tensor], tiny_llama: Path, form: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    forms = {"iterator": iter(new.items()), "in another order": reversed(list(new.items())), "module": model}
    with sync_with(make()) as sync:
        assert pushed(sync, forms[form]).num_checksums == 15


def test_a_partial_push_compares_what_it_sent_as_a_whole(make: Make, new: dict[str, torch.Tensor]) -> None:
    with sync_with(make()) as sync:
        pushed(sync, new)
        assert pushed(sync, {"model.norm.weight": new["model.norm.weight"]}, partial=True).num_checksums == 1
        keep_old(sync, new, lambda name, bucket: True)
        with pytest.raises(WeightUpdateError, match="checksums of model.norm.weight"):
            sync.push({"model.norm.weight": new["model.norm.weight"] * 2}, partial=True)
        keep_old(sync, new, lambda name, bucket: False)
        pushed(sync, new)
        # The server fuses it with others, which were not given.
        assert pushed(sync, {PROJECTIONS.format("q"): new[PROJECTIONS.format("q")]}, partial=True).num_checksums == 0


def test_frozen_parts_of_a_fused_tensor_are_read_from_the_model(make: Make, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == PROJECTIONS.format("q"))
    with sync_with(make(), config=SyncConfig(only_trainable=True, verify_atol=1e9)) as sync:
        pushed(sync, model)
        report = pushed(sync, model)
        assert (report.num_tensors, report.num_checksums) == (1, 1)


def test_what_was_written_to_a_folder_is_compared(
    make: Make, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    config = SyncConfig(transport="disk", disk_dir=tmp_path, verify_atol=1e9)
    with sync_with(make(tp_size=2), config=config) as sync:
        assert pushed(sync, new).num_checksums == 30


def test_a_server_that_reports_no_checksums_is_named_and_not_asked_again(
    make: Make, new: dict[str, torch.Tensor]
) -> None:
    server = make(faults=(Fault(path="/weights_checker", action="refuse", message="needs CUDA", times=0),))
    with sync_with(server) as sync:
        for _ in range(2):
            report = pushed(sync, new)
            assert report.num_checksums == 0
            assert "needs CUDA" in report.not_compared[server.url]
    assert len(skips(server)) == 1


def test_copies_beyond_the_limit_are_hashed_at_once(
    make: Make, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expected, "_KEPT_BYTES", 10_000)
    with sync_with(make(tp_size=2)) as sync:
        for weights in (new, old):
            assert pushed(sync, iter(weights.items())).num_checksums == 30
        keep_old(sync, old, lambda name, bucket: name == PROJECTIONS.format("k"))
        with pytest.raises(WeightUpdateError, match=FUSED):
            sync.push(iter(new.items()))


def test_a_hash_that_was_not_computed_before_its_tensor_was_freed_raises_no_alarm() -> None:
    """The kind's layout is known since another layer, whose tensors are still there."""

    class Freed(Values):
        def of(self, unit: FusedUnit, tensor: TensorId, layout: str | None = None) -> Iterator[tuple[str, str]]:
            pairs = super().of(unit, tensor, layout)
            return (pair for pair in pairs if pair[0] == "whole" or tensor.name.startswith("layers.1"))

    verdict = LayoutRules().judge([found("rows:new"), found("rows:new", layer=1)], Freed("new", "whole", "rows"), None)
    assert (verdict.num_equal, len(verdict.stale), len(verdict.unproven)) == (1, 0, 1)


def test_a_share_outside_0_to_1_is_refused() -> None:
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="verify_share"):
            SyncConfig(verify_share=share)


# -------------------------------------------------------------------------------------------------------- the sample


def large_model(layers: int) -> tuple[list[FusedUnit], list[Bucket]]:
    """Layers of two matrices of 8 MB and a norm; each matrix travels alone, or with the norm."""
    specs = []
    for layer in range(layers):
        for name, shape in (("norm", (1024,)), ("o_proj", (1024, 2048)), ("down_proj", (1024, 2048))):
            specs.append(TensorSpec(name=f"layers.{layer}.{name}.weight", shape=shape, dtype=torch.float32))
    return fused_units([spec.name for spec in specs]), plan_buckets(specs, bucket_bytes=9 * 2**20)


def test_each_push_hashes_all_norms_and_every_tensor_has_its_turn() -> None:
    units, buckets = large_model(32)
    chooser = SampleChooser(1 / 16)
    turns = []
    for _ in range(64 // 3 + 1):
        sample = [unit.name for unit in chooser.choose(units, buckets)]
        assert {unit.name for unit in units if "norm" in unit.name} <= set(sample)
        turns += [name for name in sample if "norm" not in name]
        assert len(sample) <= 32 + 4
    assert set(turns) == {unit.name for unit in units if "norm" not in unit.name}


def test_every_bucket_of_small_matrices_has_a_tensor_in_each_sample() -> None:
    specs = [TensorSpec(name=f"layers.{i}.o_proj.weight", shape=(300, 300), dtype=torch.float32) for i in range(120)]
    units, buckets = fused_units([spec.name for spec in specs]), plan_buckets(specs, bucket_bytes=4 * 2**20)
    chooser = SampleChooser(1 / 4)
    for _ in range(3):
        sample = {unit.name for unit in chooser.choose(units, buckets)}
        assert all(sample.intersection(bucket.names) for bucket in buckets)


def test_one_tensor_larger_than_the_share_has_its_turn_too() -> None:
    sizes = {"layers.0.o_proj.weight": 64, "layers.1.o_proj.weight": 64, "lm_head.weight": 4096}
    specs = [TensorSpec(name=name, shape=(rows, 2**14), dtype=torch.float32) for name, rows in sizes.items()]
    chooser = SampleChooser(1 / 16)
    buckets = plan_buckets(specs, bucket_bytes=2**20)
    samples = [chooser.choose(fused_units(sizes), buckets) for _ in range(3)]
    assert {unit.name for sample in samples for unit in sample} == set(sizes)


def test_small_tensors_that_exceed_the_share_take_turns_too() -> None:
    names = [f"layers.{i}.norm.weight" for i in range(2000)]
    specs = [TensorSpec(name=name, shape=(2**14,), dtype=torch.float32) for name in names]
    chooser = SampleChooser(1 / 16)
    buckets = plan_buckets(specs, bucket_bytes=2**20)
    samples = [chooser.choose(fused_units(names), buckets) for _ in range(17)]
    assert {unit.name for sample in samples for unit in sample} == set(names)


def test_what_a_server_leaves_out_never_contains_a_wanted_name() -> None:
    units = fused_units(
        [f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (1, 11) for part in "qkvo"] + ["model.norm.weight"]
    )
    sample = [unit for unit in units if unit.name in ("model.layers.11.self_attn.qkv_proj.weight", "model.norm.weight")]
    skip = skip_list(units, sample, ["model.extra_scale", "language_model.model.norm.weight"])
    assert set(skip) == {"model.layers.1.self_attn.", "model.layers.11.self_attn.o_proj.weight", "model.extra_scale"}
    for wanted in ("model.layers.11.self_attn.qkv_proj.weight", "language_model.model.norm.weight"):
        assert not any(word in wanted for word in skip)


# ---------------------------------------------------------------------------------------------- layouts and alarms


class Values:
    """Hashes ``<layout>:<value>`` for every layout; ``None`` is a unit whose values are unknown."""

    def __init__(self, value: str | None, *layouts: str) -> None:
        self._value = value
        self._layouts = layouts

    def of(self, unit: FusedUnit, tensor: TensorId, layout: str | None = None) -> Iterator[tuple[str, str]]:
        if self._value is not None:
            yield from [(each, f"{each}:{self._value}") for each in self._layouts if layout in (None, each)]


def found(actual: str, *, layer: int = 0, url: str = "http://a", is_exact: bool = True) -> Finding:
    name = f"layers.{layer}.mlp.down_proj.weight"
    unit = FusedUnit(name=name, parts=(name,))
    return Finding(tensor=TensorId(url=url, name=name), unit=unit, is_exact=is_exact, shapes=((2, 2),), actual=actual)


def test_any_layout_is_accepted_until_one_has_matched() -> None:
    rules = LayoutRules()
    assert rules.judge([found("rows:new")], Values("new", "whole", "rows"), None).num_equal == 1
    verdict = rules.judge([found("whole:new")], Values("new", "whole", "rows"), None)
    assert [str(tensor) for tensor in verdict.stale] == ["layers.0.mlp.down_proj.weight"]


def test_a_tensor_that_differs_is_stale_if_another_layer_shows_how_the_kind_is_laid_out() -> None:
    verdict = LayoutRules().judge([found("whole:old"), found("whole:new", layer=1)], Values("new", "whole"), None)
    assert [tensor.name for tensor in verdict.stale] == ["layers.0.mlp.down_proj.weight"]


def test_the_layout_of_one_server_says_nothing_of_another() -> None:
    findings = [found("whole:new"), found("packed", url="http://b")]
    assert not LayoutRules().judge(findings, Values("new", "whole"), None).stale


def test_a_server_that_still_holds_the_checkpoints_tensor_is_stale_at_the_first_sync() -> None:
    for sent in ("new", "old"):
        verdict = LayoutRules().judge([found("whole:old")], Values(sent, "whole"), Values("old", "whole"))
        assert (len(verdict.stale), verdict.num_equal) == ((1, 0) if sent == "new" else (0, 1))


def test_a_server_that_held_the_checkpoint_and_now_holds_something_else_is_stale() -> None:
    rules = LayoutRules()
    rules.seen_before_push([found("whole:old")])
    assert rules.judge([found("whole:half")], Values("new", "whole"), Values("old", "whole")).stale


@pytest.mark.parametrize(
    ("before", "after", "was", "sent", "is_stale"),
    [
        ("packed-1", "packed-1", "old", "new", True),
        ("packed-1", "packed-1", "old", "old", False),
        ("packed-1", "packed-2", "old", "new", False),
        ("packed-1", "packed-1", None, "new", False),
    ],
    ids=["unchanged although it should", "unchanged as sent", "changed", "what it held is unknown"],
)
def test_a_tensor_of_unknown_layout_must_change_if_what_is_sent_changes(
    before: str, after: str, was: str | None, sent: str, is_stale: bool
) -> None:
    rules = LayoutRules()
    rules.seen_before_push([found(before)])
    verdict = rules.judge([found(after)], Values(sent, "whole"), Values(was, "whole"))
    assert (len(verdict.stale), len(verdict.unproven)) == ((1, 0) if is_stale else (0, 1))


def test_a_tensor_of_unknown_layout_is_compared_with_the_sync_before_too() -> None:
    rules = LayoutRules()
    for actual, sent, num_stale in (("p1", "v1", 0), ("p1", "v1", 0), ("p2", "v2", 0), ("p2", "v3", 1)):
        assert len(rules.judge([found(actual)], Values(sent, "whole"), None).stale) == num_stale


def test_a_name_that_merely_resembles_the_expected_one_raises_no_alarm_by_itself() -> None:
    rules = LayoutRules()
    rules.seen_before_push([found("p1", is_exact=False)])
    assert not rules.judge([found("p1", is_exact=False)], Values("new", "whole"), Values("old", "whole")).stale


def test_a_new_process_is_not_compared_with_the_values_of_the_old_one() -> None:
    rules = LayoutRules()
    rules.judge([found("p1")], Values("v1", "whole"), None)
    rules.forget_values("http://a")
    assert not rules.judge([found("p1")], Values("v2", "whole"), None).stale
