"""The tutorials' scripts, run on the shared server; a slow test runs one that starts its own servers."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

from torchrl_sglang.server import SGLangServer

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"


@pytest.fixture
def run_tutorial(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``run_tutorial(name, url, **settings)``: its output. Runs in this process: importing torchrl takes long."""
    backend = matplotlib.get_backend()
    matplotlib.use("agg")

    def run(name: str, url: str = "", **settings: str) -> str:
        for variable, value in {"URL": url, **settings}.items():
            monkeypatch.setenv(f"TUTORIAL_{variable}", value)
        runpy.run_path(str(TUTORIALS / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield run
    plt.close("all")
    matplotlib.use(backend)


def gaps(pattern: str, printed: str) -> list[float]:
    found = [float(number) for number in re.findall(pattern + r" ([0-9.e+-]+)", printed)]
    assert found, f"{pattern!r} was not printed:\n{printed}"
    return found


def test_rollouts(run_tutorial: Any, server: SGLangServer) -> None:
    printed = run_tutorial("rollouts", server.url)
    assert max(gaps(r"largest difference[^:]*:", printed)) < 1e-3
    assert max(gaps("log-probs differ by", printed)) < 1e-3
    (tempered,) = re.findall(r"logits divided by 0.6: from (\S+) to (\S+)", printed)
    assert [float(ratio) for ratio in tempered] == [pytest.approx(1, abs=1e-3)] * 2
    assert "exact_log_probs: [False, False, False]" in printed
    assert "exact_log_probs: [True, True, True]" in printed
    assert len(plt.get_fignums()) == 2


def test_weight_sync(run_tutorial: Any, pristine_server: SGLangServer) -> None:
    printed = run_tutorial("weight_sync", pristine_server.url)
    assert max(gaps("between servers and trainer after a sync:", printed)) < 1e-4
    assert max(gaps("in the verification:", printed)) < 1e-3
    assert "model.layers.1.mlp.up_proj.weight: 1 of " in printed
    assert "Did you mean 'model.layers.0.mlp.up_proj.weight'?" in printed
    assert "what the servers hold: {'old'}" in printed
    assert "the version is still the same: True" in printed
    assert "in routing: 1 of 1 servers" in printed
    assert len(plt.get_fignums()) == 2


def test_grpo_from_scratch(run_tutorial: Any, pristine_server: SGLangServer) -> None:
    printed = run_tutorial("grpo_from_scratch", pristine_server.url, STEPS="2")
    assert re.findall(r"weights v(\d+)", printed) == ["1", "2"]
    assert max(gaps("largest log-prob gap", printed)) < 1e-3
    assert len(plt.get_fignums()) == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_weight_sync_starts_two_servers_and_kills_one(run_tutorial: Any, needs_sglang: None) -> None:
    printed = run_tutorial("weight_sync")
    assert "6 responses; in routing: 1 of 2 servers" in printed
    assert "in routing: 2 of 2 servers" in printed
    assert "pause mode for requests in flight: retract" in printed
