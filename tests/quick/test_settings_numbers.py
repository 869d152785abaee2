"""Every number in every settings record is checked when the record is made, by name."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import torchrl_sglang
from torchrl_sglang import ClientConfig, RouterConfig, ServerConfig, SGLangWrapper, SyncConfig
from torchrl_sglang.agents.settings import SessionSettings
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.engine.launching import server_configs
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.ray_servers.placement import RayPlacement
from torchrl_sglang.recipes.batch.importance import truncated_importance_weights
from torchrl_sglang.recipes.data.tasks import arithmetic, python_sums
from torchrl_sglang.recipes.losses.grpo_actor import GRPOActor, make_grpo_loss
from torchrl_sglang.recipes.run.background import BackgroundRollouts
from torchrl_sglang.recipes.run.checkpoints import Checkpoints
from torchrl_sglang.recipes.setup.settings import SETTINGS
from torchrl_sglang.rollout.settings import RolloutSettings
from torchrl_sglang.testing.echo_pool import EchoPool

RECORDS: dict[type, dict[str, Any]] = {
    ClientConfig: {},
    RouterConfig: {},
    SamplingParams: {},
    ServerConfig: {"model": "m"},
    SyncConfig: {},
    RayPlacement: {},
    SessionSettings: {},
    RolloutSettings: {"input_mode": "tokens"},
    **{record: {} for record in SETTINGS.values()},
    SETTINGS["evaluate"]: {"ks": [1]},
}
"""Records that users fill in, with the fields that have no default."""

NOT_SETTINGS = {
    "SGLangEngineConfig",
    "SGLangPolicyConfig",
    "SGLangWeightSyncSchemeConfig",
    "Arguments",
    "GroupSettings",
}
"""Hydra's nodes pass their values on to the records above; a command line's words have no numbers; the collector of
agents checks its own arguments, from which it makes its record."""

NEVER = (math.nan, math.inf, -math.inf, True, False, "1", "", b"1", [1], {}, 1j, -1e300)
NEGATIVE_ALLOWED = {"frequency_penalty", "presence_penalty", "sampling_seed", "top_k"}
ZERO_ALLOWED = {
    *("connect_retries", "stop_timeout_s", "cpus_per_server", "max_resumes", "weight_decay", "warmup_steps", "seed"),
    *("every", "report_every_s", "max_new_tokens", "min_new_tokens", "temperature", "min_p"),
    *("frequency_penalty", "presence_penalty", "sampling_seed"),
}
NUMBER_LISTS = {"betas": (2, 0.9), "ks": (1, 1), "gpus": (1, 0), "stop_token_ids": (1, 0)}
"""Fields that hold several numbers: how many, and one that is accepted."""


def numeric_fields() -> list[Any]:
    found = []
    for record in RECORDS:
        for field in dataclasses.fields(record):
            annotation = str(field.type)
            if annotation.split(" ")[0] in ("int", "float"):
                found.append(pytest.param(record, field, id=f"{record.__name__}.{field.name}"))
    return found


@pytest.mark.parametrize(("record", "field"), numeric_fields())
def test_a_number_that_cannot_be_honoured_is_refused_by_name(record: type, field: Any) -> None:
    bad: list[Any] = list(NEVER)
    if str(field.type).startswith("int"):
        bad += [1.5, 2.0, numpy.float64(1)]
    else:
        bad.append(10**400)
    if "None" not in str(field.type):
        bad.append(None)
    if field.name not in NEGATIVE_ALLOWED:
        bad += [-1, -0.5]
    if field.name not in ZERO_ALLOWED | NEGATIVE_ALLOWED:
        bad.append(0)
    if field.name in ("port", "master_port"):
        bad.append(65536)
    if field.name.endswith(("_s", "_timeout")) and field.name != "assumed_bytes_per_s":
        bad.append(1e300)  # Python's waits overflow
    for value in bad:
        with pytest.raises(ConfigError, match=field.name):
            record(**{**RECORDS[record], field.name: value})


@pytest.mark.parametrize(
    ("record", "field"), [param for param in numeric_fields() if param.values[0] is not SamplingParams]
)
def test_what_is_accepted_is_a_python_number(record: type, field: Any) -> None:
    whole = str(field.type).startswith("int")
    given = numpy.int64(1) if whole else numpy.float32(0.5)
    kept = getattr(record(**{**RECORDS[record], field.name: given}), field.name)
    assert type(kept) in (int, float)
    assert kept == given


@pytest.mark.parametrize(
    ("record", "name"),
    [
        pytest.param(record, field.name, id=f"{record.__name__}.{field.name}")
        for record in RECORDS
        for field in dataclasses.fields(record)
        if field.name in NUMBER_LISTS
    ],
)
def test_each_number_of_a_list_is_checked(record: type, name: str) -> None:
    count, good = NUMBER_LISTS[name]
    record(**{**RECORDS[record], name: [good] * count})
    for value in (math.nan, math.inf, True, "1", None, -1):
        with pytest.raises(ConfigError, match=name):
            record(**{**RECORDS[record], name: [good] * (count - 1) + [value]})


def test_every_record_of_settings_is_known_to_this_test() -> None:
    """A new record named like a configuration must be added to RECORDS, where its numbers are checked."""
    found: set[type] = set()
    for module in pkgutil.walk_packages(torchrl_sglang.__path__, "torchrl_sglang."):
        if module.name.startswith(("torchrl_sglang.server.cpu_stand_ins", "torchrl_sglang.__main__")):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            own = isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.name
            if own and value.__name__.endswith(("Config", "Settings", "Params", "Placement", "Arguments")):
                found.add(value)
    assert {record.__name__ for record in found - set(RECORDS)} <= NOT_SETTINGS


def test_a_smallest_above_the_largest_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_batch_size"):
        RolloutSettings(min_batch_size=3, max_batch_size=2)
    with pytest.raises(ConfigError, match="min_new_tokens"):
        SamplingParams(min_new_tokens=3, max_new_tokens=2)
    with pytest.raises(ConfigError, match="smallest"):
        python_sums(smallest=9, largest=9)
    with pytest.raises(ConfigError, match="answers"):
        SETTINGS["evaluate"](ks=[9], answers=8)


ONE = torch.zeros(1)
ARGUMENTS: dict[str, tuple[Callable[[Any], object], tuple[Any, ...]]] = {
    "tp_size": (lambda v: server_configs("m", tp_size=v, dp_size=1, gpus=None, given={}), (0, 1.5, "2", True)),
    "dp_size": (lambda v: server_configs("m", tp_size=1, dp_size=v, gpus=None, given={}), (0, 1.5, "2", True, None)),
    "context_length": (
        lambda v: server_configs("m", tp_size=1, dp_size=1, gpus=None, given={"max_model_len": v}),
        (0, 1.5, "2", math.nan),
    ),
    "max_resumes": (lambda v: SGLangWrapper(EchoPool(), max_resumes=v), (-1, 1.5, math.nan, None)),
    "batching_timeout": (lambda v: SGLangWrapper(EchoPool(), batching_timeout=v), (0, math.nan, math.inf, "1")),
    "cap": (lambda v: truncated_importance_weights(ONE, ONE, cap=v), (0, math.nan, math.inf, None)),
    "temperature": (lambda v: GRPOActor(torch.nn.Linear(1, 1), temperature=v), (-1, math.nan, "1")),
    "clip_epsilon": (
        lambda v: make_grpo_loss(GRPOActor(torch.nn.Linear(1, 1), temperature=1), clip_epsilon=v),
        (0, 1, -0.2, math.nan, None),
    ),
    "ahead": (lambda v: BackgroundRollouts(iter([]), ahead=v), (-1, 1.5, None, True)),
    "timeout_s": (lambda v: BackgroundRollouts(iter([]), ahead=1, timeout_s=v), (0, math.nan, math.inf, None)),
    "keep": (lambda v: Checkpoints(None, keep=v), (0, 1.5, None)),  # type: ignore[arg-type]
    "largest": (lambda v: arithmetic(largest=v), (0, 1.5, "9", None)),
    "held_out": (lambda v: arithmetic(held_out=v), (-1, 1.5, "9", True)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_constructors_number_is_checked_too(name: str) -> None:
    call, bad = ARGUMENTS[name]
    for value in bad:
        with pytest.raises(ConfigError, match=name):
            call(value)
