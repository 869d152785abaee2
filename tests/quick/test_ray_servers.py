"""What is said of servers on Ray before Ray is asked; ``tests/loop/test_ray.py`` has a real one."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from torchrl_sglang import ConfigError
from torchrl_sglang.ray_servers import RayPlacement, launch_on_ray


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_placement_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RayPlacement(**wrong)


def test_servers_are_at_least_one() -> None:
    with pytest.raises(ConfigError, match="num_servers must be at least 1"):
        launch_on_ray("model", num_servers=0)
