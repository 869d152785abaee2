"""``WeightSync.heal`` of a sharded model: the ranks that only help to gather know the last weights too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fake_sglang import FakeServer
from torchrl_sglang import ConfigError, SyncConfig, WeightSync
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool


def test_a_rank_that_helps_to_gather_helps_again(
    make: Callable[..., FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync: Any = WeightSync(SGLangPool([SGLangClient(make().url)]), SyncConfig(transport="broadcast"))
    helped: list[object] = []
    monkeypatch.setattr(sync._planner, "open_source", lambda weights: SimpleNamespace(is_sender=False, one_shot=False))
    monkeypatch.setattr(sync._pusher, "_help", lambda *arguments: helped.append(arguments))
    with pytest.raises(ConfigError, match="no weights to send again"):
        sync.heal()
    sync.push({})
    sync.heal()  # raised here while the first rank waited in a gather
    assert len(helped) == 2
    sync.close()
