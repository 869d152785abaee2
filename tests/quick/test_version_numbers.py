"""Version numbers that a caller gives to a push."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.fake_sglang import FakeServer
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import ConfigError, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool

WRONG = [True, -1, 1.5, "5", float("nan"), float("inf"), 10**30]


def test_what_is_no_version_number_is_refused_before_anything_is_sent(fake: FakeServer) -> None:
    client = SGLangClient(fake.url)
    sync = WeightSync(SGLangPool([client]), SyncConfig(transport="http", verify="off"))
    tensors = read_checkpoint(fake.settings.model_path)
    for wrong in WRONG:
        value: Any = wrong
        with pytest.raises(ConfigError, match="version must be"):
            sync.push(tensors, version=value)
        with pytest.raises(ConfigError, match="version must be"):
            sync.push_in_background(tensors, version=value)
    assert "/pause_generation" not in [event["path"] for event in fake.events]
    report = sync.push(tensors, version=np.int64(7))  # type: ignore[arg-type]
    assert report is not None
    assert report.version == 7
    assert type(report.version) is int
    sync.close()
