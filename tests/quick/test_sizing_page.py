"""The table of compatible versions agrees with the package's requirements and with the pins of the tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "sizing.md").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
PINS = "\n".join(
    path.read_text()
    for path in (ROOT / "requirements.txt", ROOT / "torchrl_sglang" / "server" / "cpu_requirements.txt")
)
OLD_PINS = "\n".join(path.read_text() for path in (ROOT / "tests").glob("torchrl-*.txt"))


def row(name: str) -> list[str]:
    found = re.search(rf"^\| {name} \| (.*) \|$", PAGE, re.MULTILINE)
    assert found is not None, f"docs/sizing.md has no row {name}"
    return [cell.strip() for cell in found[1].split("|")]


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("torch", "torch"),
        ("transformers", "transformers"),
        ("TorchRL", "torchrl"),
        ("tensordict", "tensordict"),
        ("SGLang", "sglang"),
        ("sglang-router", "sglang-router"),
        ("PEFT", "peft"),
    ],
)
def test_a_packages_lowest_and_tested_versions_are_the_projects(name: str, package: str) -> None:
    allowed, tested, besides = row(name)
    lowest = re.search(rf'"{package}>=([\d.]+)', PROJECT)
    assert lowest is not None
    assert lowest[1] in allowed
    pinned = re.search(rf"^{package}==([\w.]+)", PINS, re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in tested
    for old in re.findall(rf"^{package}==([\w.]+)", OLD_PINS, re.MULTILINE):
        assert old in tested + besides


def test_the_lowest_python_is_the_projects() -> None:
    found = re.search(r'requires-python = ">=([\d.]+)"', PROJECT)
    assert found is not None
    assert row("Python")[0].startswith(found[1])


def test_the_sizes_follow_from_the_formulas() -> None:
    """16 bytes per parameter; 2 x layers x key-value heads x head size x bytes per token."""
    models = {
        "SmolLM2-135M, float32 everywhere": (0.1345, 4, 2 * 30 * 3 * 64 * 4),
        "Qwen3-0.6B, bfloat16 server": (0.596, 2, 2 * 28 * 8 * 128 * 2),
        "Qwen3-4B, bfloat16 server": (4.02, 2, 2 * 36 * 8 * 128 * 2),
    }
    for name, (billions, bytes_each, bytes_per_token) in models.items():
        _, trainer, server, cache = (float(cell.split()[0]) for cell in row(name))
        assert trainer == pytest.approx(16 * billions, rel=0.03)
        assert server == pytest.approx(bytes_each * billions, rel=0.03)
        assert cache == pytest.approx(bytes_per_token * 100_000 / 1e9, rel=0.01)
