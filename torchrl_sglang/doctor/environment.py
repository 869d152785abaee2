"""What is installed and visible on both sides: the trainer's Python and the server's."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from torchrl_sglang.doctor.checks import Check

__all__ = ["check_environment", "look_into"]

_PROBE = """
import importlib.metadata as m, json
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
facts = {"sglang": version("sglang"), "torch": version("torch"), "cuda": None, "nccl": None}
try:
    import torch
    facts["cuda"] = torch.version.cuda
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
except ImportError: pass
print(json.dumps(facts))
"""

_PROBE_TIMEOUT_S = 120.0
"""Importing torch from a cold disk takes this long at worst."""


def look_into(python: str) -> Mapping[str, Any]:
    """Versions that another Python would use: keys ``sglang``, ``torch``, ``cuda``, ``nccl``; ``None`` where missing.

    Raises:
        OSError: that Python can't be run.
        subprocess.SubprocessError: it fails or hangs.
    """
    done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True)
    facts: Mapping[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def check_environment(server_python: str | None = None) -> list[Check]:
    """Look at both Pythons and the GPUs.

    Args:
        server_python: the Python that has SGLang; ``None`` is this one.
    """
    checks = [_trainer(), _gpus()]
    python = server_python or sys.executable
    try:
        facts = look_into(python)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        checks.append(
            Check(
                name="server's Python",
                status="fail",
                detail=f"{python} can't be asked: {error}",
                next_step="name the Python of the environment that has SGLang",
            )
        )
        return checks
    return [*checks, _server(python, facts), _nccl(facts)]


def _trainer() -> Check:
    names = ("torchrl-sglang", "torchrl", "tensordict", "torch", "transformers")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    return Check(name="trainer's Python", status="pass", detail=f"{platform.python_version()}: {versions}")


def _gpus() -> Check:
    count = torch.cuda.device_count()
    if count == 0:
        return Check(
            name="GPUs",
            status="skip",
            detail="none visible: SGLang runs on its CPU engine and weights travel over gloo",
        )
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    listed = ", ".join(f"{each.name} ({each.total_memory / 2**30:.0f} GiB)" for each in found)
    driver = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    detail = f"{listed}; driver {driver[0] if driver else 'unknown'}, CUDA {torch.version.cuda}"
    if count == 1:
        return Check(
            name="GPUs",
            status="warn",
            detail=detail,
            next_step="NCCL can't join two processes on one GPU: give the server another one, or use "
            "SyncConfig(transport='disk')",
        )
    topology = _nvidia_smi("topo", "-m")
    links = "NVLink between GPUs" if "NV" in topology.replace("NVIDIA", "") else "no NVLink seen"
    return Check(name="GPUs", status="pass", detail=f"{detail}; {links}")


def _server(python: str, facts: Mapping[str, Any]) -> Check:
    if facts["sglang"] is None:
        return Check(
            name="server's Python",
            status="fail",
            detail=f"{python} has no SGLang",
            next_step="without a GPU: torchrl-sglang install-cpu-server; with one: pip install sglang into an "
            "environment of its own, then ServerConfig(python=...)",
        )
    old = tuple(int(part) for part in facts["sglang"].split(".")[:3] if part.isdigit()) < (0, 5, 20)
    return Check(
        name="server's Python",
        status="warn" if old else "pass",
        detail=f"{python}: sglang {facts['sglang']}, torch {facts['torch']}",
        next_step="only 0.5.20 and later were tried; upgrade SGLang" if old else "",
    )


def _nccl(facts: Mapping[str, Any]) -> Check:
    if torch.version.cuda is None or torch.cuda.device_count() == 0:
        return Check(name="NCCL", status="skip", detail="no GPU here, gloo is used")
    ours = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    theirs = facts["nccl"]
    if ours == theirs:
        return Check(name="NCCL", status="pass", detail=f"{ours} on both sides")
    return Check(
        name="NCCL",
        status="fail",
        detail=f"the trainer has {ours}, the server {theirs}: NCCL refuses to mix versions",
        next_step="install the same torch on both sides, or use SyncConfig(transport='disk')",
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _nvidia_smi(*words: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
