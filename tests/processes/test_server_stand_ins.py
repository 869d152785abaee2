"""The import stand-ins: they support what SGLang does at import time, and change nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from torchrl_sglang.server.cpu import STAND_INS_PATH


def run(script: str, **variables: str) -> str:
    environment = {**os.environ, **variables, "PYTHONPATH": str(STAND_INS_PATH)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_can_be_defined_and_the_helpers_work() -> None:
    run(
        """
import triton, triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.cache import CacheManager, default_cache_dir
import triton.language.extra as extra
assert extra.libdevice is libdevice and triton.language is tl

@triton.jit
def plain(x, BLOCK: tl.constexpr): return x
@triton.autotune(configs=[triton.Config({"B": 1}, num_warps=4)], key=["n"])
@triton.jit
def tuned(x): return x
assert plain(3, 1) == 3 and tuned(4) == 4

class Mine(CacheManager):
    pass
Mine("key")
assert triton.cdiv(7, 2) == 4 and triton.cdiv(8, 2) == 4
assert [triton.next_power_of_2(n) for n in (0, 1, 2, 3, 5, 1024)] == [1, 1, 2, 4, 8, 1024]
assert not triton.anything and list(triton.anything) == [] and not hasattr(triton, "__wrapped__")
"""
    )


def test_a_missing_module_of_another_name_is_still_missing() -> None:
    run(
        """
import torchvision, torchvision.transforms.functional
try:
    import no_such_module_at_all
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("a stand-in answered for a foreign name")
"""
    )


def test_calling_a_missing_kernel_raises_an_error_that_names_it() -> None:
    run(
        """
from sgl_kernel import verify_tree_greedy_cpu
try:
    verify_tree_greedy_cpu()
except NotImplementedError as error:
    assert "verify_tree_greedy_cpu" in str(error) and "speculative" in str(error)
else:
    raise SystemExit("it ran")
"""
    )


@pytest.mark.parametrize("patched", [False, True])
def test_torch_ignores_pinned_memory_only_when_told_to(patched: bool) -> None:
    script = """
import torch
before = torch.zeros
import sgl_kernel
with torch.device("meta"):
    assert torch.zeros(2).device.type == "meta"
if torch.zeros is before:
    print("untouched")
else:
    print(torch.zeros(2, pin_memory=True).pin_memory().tolist())
"""
    variables = {"SGLANG_CPU_STAND_INS_NO_PINNED_MEMORY": "1"} if patched else {}
    assert run(script, **variables).strip() == ("[0.0, 0.0]" if patched else "untouched")


def test_the_trainer_does_not_import_the_stand_ins() -> None:
    import torchrl_sglang.server  # noqa: F401

    assert not any(path and os.path.samefile(path, STAND_INS_PATH) for path in sys.path if os.path.exists(path))  # noqa: PTH110, PTH121
