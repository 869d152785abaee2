"""Checks of the installation: the trainer's Python, the server's Python, GPUs and NCCL."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.doctor.checks import Check
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server.cpu import needs_cpu_engine
from torchrl_sglang.server.locate import find_python, missing_packages

__all__ = ["check_environment"]

_PROBE = """
import importlib.metadata as m, json
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
found = {"sglang": version("sglang"), "torch": version("torch"), "nccl": None}
try:
    import torch
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None
except ImportError: pass
print(json.dumps(found))
"""

_INSTALL = (
    "without a GPU: torchrl-sglang install-cpu-server; with one: pip install sglang into an environment of its own, "
    "then ServerConfig(python=...)"
)

_PROBE_TIMEOUT_S = 120.0
"""The longest that importing torch from a cold disk takes."""


def _read_versions(python: str) -> Mapping[str, Any]:
    """Versions in another Python: keys ``sglang``, ``torch`` and ``nccl``; ``None`` for what is missing.

    Raises:
        OSError: that Python can't be run.
        subprocess.SubprocessError: it fails or hangs.
    """
    done = subprocess.run(
        [python, "-c", _PROBE],
        capture_output=True,
        text=True,
        timeout=_PROBE_TIMEOUT_S,
        check=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # not the modules of the working directory
    )
    versions: Mapping[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return versions


def check_environment(server: ServerConfig | None = None, *, launches: bool = True) -> list[Check]:
    """Check both Pythons, the GPUs, and that both sides have the same NCCL.

    Args:
        server: how a server would be launched here; its ``python`` and ``device`` count.
        launches: a server has to run on this machine. Otherwise, as for a trainer whose servers run elsewhere, a
            machine without SGLang passes.
    """
    config = server or ServerConfig(model="-")
    checks = [_trainer(), _gpus()]
    try:
        python = find_python(config)
    except ConfigError as error:
        return [*checks, _no_server(str(error), launches)]
    try:
        versions = _read_versions(python)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [*checks, _no_server(f"{python} can't be run: {error}", launches)]
    checks.append(_server(python, versions, launches, cpu=needs_cpu_engine(config)))
    # A server that runs already has an NCCL of its own, which no endpoint of SGLang reports.
    return [*checks, _nccl(versions)] if launches else checks


def _no_server(problem: str, launches: bool) -> Check:
    if launches:
        return Check(name="server's Python", status="fail", detail=problem, next_step=_INSTALL)
    return Check(
        name="server's Python", status="skip", detail="no SGLang here, and none is needed: the server runs already"
    )


def _trainer() -> Check:
    names = ("torchrl-sglang", "torchrl", "tensordict", "torch", "transformers")
    versions = {name: _version(name) for name in names}
    missing = [name for name, version in versions.items() if version is None]
    listed = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    return Check(
        name="trainer's Python",
        status="fail" if missing else "pass",
        detail=f"{platform.python_version()} ({sys.executable}): {listed}",
        next_step=f"pip install {' '.join(missing)}" if missing else "",
    )


def _gpus() -> Check:
    count = torch.cuda.device_count()
    if count == 0:
        return Check(
            name="GPUs",
            status="skip",
            detail="none visible: SGLang runs on its CPU engine, with its weights in main memory",
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
            next_step="NCCL can't connect two processes on one GPU: give the server another one, or use "
            "SyncConfig(transport='disk')",
        )
    topology = _nvidia_smi("topo", "-m")
    links = "NVLink between GPUs" if "NV" in topology.replace("NVIDIA", "") else "no NVLink seen"
    return Check(name="GPUs", status="pass", detail=f"{detail}; {links}")


def _server(python: str, versions: Mapping[str, Any], launches: bool, *, cpu: bool) -> Check:
    if versions["sglang"] is None:
        return _no_server(f"{python} has no SGLang", launches)
    detail = f"{python}: sglang {versions['sglang']}, torch {versions['torch']}"
    missing = missing_packages() if cpu and python == sys.executable else []
    old = tuple(int(part) for part in versions["sglang"].split(".")[:3] if part.isdigit()) < (0, 5, 20)
    step = "only 0.5.20 and later are tested; upgrade SGLang" if old else ""
    if missing:
        step = f"SGLang may not start without {', '.join(missing[:5])}: torchrl-sglang install-cpu-server"
    return Check(name="server's Python", status="warn" if step else "pass", detail=detail, next_step=step)


def _nccl(server_versions: Mapping[str, Any]) -> Check:
    if torch.version.cuda is None or torch.cuda.device_count() == 0:
        return Check(name="NCCL", status="skip", detail="no GPU here: a broadcast goes over gloo")
    trainers = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    servers = server_versions["nccl"]
    if trainers == servers:
        return Check(name="NCCL", status="pass", detail=f"{trainers} on both sides")
    return Check(
        name="NCCL",
        status="fail",
        detail=f"the trainer has {trainers}, the server {servers}: NCCL refuses to mix versions",
        next_step="install the same torch on both sides, or use SyncConfig(transport='disk')",
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi(*words: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
