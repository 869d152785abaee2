"""The kit for a borrowed GPU: its dry run on the CPU, with torch alone, from the archive that is carried there."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parents[1] / "gpu"
ABSENT = ("torchrl", "tensordict", "hydra", "omegaconf", "psutil", "sglang", "ray", "peft")


def unpack(folder: Path) -> Path:
    """Make the archive in small parts, put these together, and unpack them; returns the kit's folder."""
    words = [sys.executable, str(GPU / "make_kit.py"), "--out", str(folder), "--part-mb", "0.4"]
    subprocess.run(words, check=True, capture_output=True)
    assert all(part.stat().st_size <= 400_000 for part in folder.glob("gpu-kit.tar.gz.*"))
    subprocess.run("cat gpu-kit.tar.gz.* | tar xz", shell=True, check=True, cwd=folder)
    return folder / "gpu-kit"


def dry_run(kit: Path, tmp_path: Path, *names: str) -> dict[str, Any]:
    blocked = tmp_path / "absent"
    blocked.mkdir()
    for name in ABSENT:
        (blocked / f"{name}.py").write_text("raise ImportError('it is not on the other machine')")
    environ = {**os.environ, "PYTHONPATH": str(blocked), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(kit / "tests/gpu/kit.py"), "--device", "cpu", "--out", str(tmp_path / "out")]
    run = subprocess.run([*words, "--only", *names], env=environ, capture_output=True, text=True, cwd=tmp_path)
    report: dict[str, Any] = json.loads((tmp_path / "out/report.json").read_text())
    failed = {name: result for name, result in report.items() if result["status"] == "FAIL"}
    assert failed == {}
    assert run.returncode == 0, run.stderr
    return report


@pytest.mark.slow
def test_the_archive_runs_with_torch_alone(tmp_path: Path) -> None:
    report = dry_run(unpack(tmp_path), tmp_path, "ipc", "self-test")
    assert report["ipc"]["status"] == "pass"
    assert report["self-test"]["status"] == "skip"
    assert "it is not on the other machine" in report["self-test"]["why"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_check_that_needs_no_gpu_passes(tmp_path: Path) -> None:
    report = dry_run(
        GPU.parents[1], tmp_path, "environment", "ipc", "reuse", "dead-receiver", "streams", "devices", "group"
    )
    skipped = {name: result["why"] for name, result in report.items() if result["status"] == "skip"}
    assert set(skipped) == {"streams", "devices"}


def test_every_check_is_listed_and_explained() -> None:
    listed = ast.literal_eval((GPU / "kit.py").read_text().partition("NAMES = ")[2].partition("\n")[0])
    [checks] = [
        node.value
        for node in ast.parse((GPU / "checks.py").read_text()).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "CHECKS"
    ]
    assert isinstance(checks, ast.Dict)
    assert tuple(ast.literal_eval(key) for key in checks.keys if key is not None) == listed
    page = (GPU / "README.md").read_text()
    assert all(f"| `{name}` |" in page for name in listed)
