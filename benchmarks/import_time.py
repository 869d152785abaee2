"""Measures the time to import this package beside that of the libraries it builds on.

    python benchmarks/import_time.py

Each import runs in a fresh interpreter, in turn. Names are loaded on first use, so the package alone needs no torch;
the policy, the engine and the weight sync need TorchRL and transformers, as a training script does anyway.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable

from measuring import Recorder, add_common_arguments

LIBRARIES = "import torch, transformers, tensordict, torchrl, torchrl.data.llm, torchrl.modules.llm"
CASES = {
    "the package beside torch": ("import torch", "import torchrl_sglang"),
    "policy, engine and sync beside their libraries": (
        LIBRARIES,
        "from torchrl_sglang import AsyncSGLang, SGLangWrapper, SGLangWeightSyncScheme, WeightSync",
    ),
}


def interpreter(code: str) -> Callable[[], None]:
    def run() -> None:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_common_arguments(parser, pairs=9)
    args = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    record = Recorder("import", args.rows, args.max_repeats)
    for name, (base, other) in CASES.items():
        record.measure(name, {"libraries": interpreter(base), "package": interpreter(other)}, pairs=args.pairs)


if __name__ == "__main__":
    main()
