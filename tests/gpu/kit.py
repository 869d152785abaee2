"""Checks the trainer's side of the weight transports on one GPU, on a machine with torch and little else.

    python tests/gpu/kit.py                        # all checks, each in a process of its own: some minutes
    python tests/gpu/kit.py --device cpu           # a dry run of what does not need a GPU
    python tests/gpu/kit.py --only ipc streams     # some of them
    python tests/gpu/kit.py --out FOLDER           # where report.json and a log per check go (default: outputs/gpu-kit)

Neither TorchRL nor SGLang is needed: a process of ours (receiver.py) opens the weights as a server's rank does. With
SGLang in this or another environment (--sglang PYTHON) the last check runs `torchrl-sglang doctor --self-test`.
A check ends in pass, FAIL, or skip with the reason; the exit status is 1 if one failed. Steps: tests/gpu/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# One list here and one of functions in checks.py, which needs torch: a test compares them.
NAMES = ("environment", "ipc", "reuse", "dead-receiver", "streams", "devices", "group", "self-test")
LIMIT_S = 320


def run_here(name: str, device: str) -> dict[str, Any]:
    """Run one check in this process."""
    import torch
    from stand_ins import prepare_imports

    if device == "cuda" and not torch.cuda.is_available():
        return {"status": "skip", "why": f"torch {torch.__version__} finds no GPU: --device cpu is the dry run"}
    prepare_imports()
    import checks

    try:
        return {"status": "pass", "facts": checks.CHECKS[name](device)}
    except checks.Skip as reason:
        return {"status": "skip", "why": str(reason)}


def run_checks(names: list[str], device: str, out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run each check in a process of its own: one that crashes or hangs ends none of the others."""
    for name in names:
        started = time.monotonic()
        answer = out / f"{name}.json"
        answer.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "kit.py"), "--device", device, "--here", name, "--out", str(out)]
        with (out / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                status = str(process.wait(LIMIT_S))
            except subprocess.TimeoutExpired:
                status = f"still running after {LIMIT_S} s"
            finally:  # also when this program is interrupted
                process.kill()
                process.wait()
        if answer.exists():
            result = json.loads(answer.read_text())
        else:
            lines = (out / f"{name}.log").read_text().strip().splitlines()
            result = {"status": "FAIL", "why": lines[-1] if lines else "", "exit": status, "tail": lines[-30:]}
        yield name, {**result, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu-kit"))
    parser.add_argument("--sglang", metavar="PYTHON", help="Python of an environment with SGLang and TorchRL")
    parser.add_argument("--here", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.here:
        result = run_here(args.here, args.device)
        (args.out / f"{args.here}.json").write_text(json.dumps(result, default=str))
        return 0
    if args.sglang:
        os.environ["KIT_SGLANG_PYTHON"] = args.sglang
    report = {}
    for name, result in run_checks(args.only, args.device, args.out):
        report[name] = result
        (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{result['status']:5} {name:14} {result['seconds']:6.1f} s  {result.get('why', '')}", flush=True)
        for fact, value in result.get("facts", {}).items():
            print(f"      {fact}: {value}", flush=True)
    print(f"the report is {args.out}/report.json")
    return int(any(result["status"] == "FAIL" for result in report.values()))


if __name__ == "__main__":
    sys.exit(main())
