"""Checks of ``launch_on_ray`` that need no Ray; ``tests/loop/test_ray.py`` uses a real one."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from torchrl_sglang import ConfigError
from torchrl_sglang.ray_servers import RayPlacement, launch_on_ray


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'torchrl-sglang\[ray\]'"):
        launch_on_ray("model", device="cpu")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strategy": "NEAR"}, "strategy must be one of"),
        ({"timeout_s": 0}, "timeout_s must be positive"),
        ({"cpus_per_server": -1}, "cpus_per_server must be at least 0"),
        ({"hosts": "127.0.0.1"}, "hosts must be a list"),
    ],
)
def test_an_invalid_placement_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RayPlacement(**wrong)


def test_num_servers_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match="num_servers must be at least 1"):
        launch_on_ray("model", num_servers=0)
