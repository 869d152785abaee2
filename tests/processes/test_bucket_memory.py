"""Peak memory of packing a model into buckets, measured in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

MEMORY_SCRIPT = """
import json, sys, torch
import peft
from tensordict import TensorDict
from torch import nn
from torchrl_sglang.weights.buckets.layout import plan_buckets
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.source.factory import open_source

torch.set_num_threads(1)
MIB = 2**20
model = nn.ModuleDict({"embed": nn.Embedding(12, MIB)})                                 # 48 MiB, larger than a bucket
model.update({f"layer{i}": nn.Linear(1024, 2048, bias=False) for i in range(32)})       # 8 MiB each
for parameter in model.parameters():
    parameter.data.fill_(0.5)
checkpoint = Checkpoint.from_specs({n: (p.shape, p.dtype) for n, p in model.named_parameters()})
adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=r"layer.*", init_lora_weights=False), model)
plain = nn.ModuleDict({n: getattr(m, "base_layer", m) for n, m in adapted.items()})

def gathered():                                                                         # copies every tensor it reads
    return ((n, p.detach() + 0) for n, p in plain.named_parameters())

forms = {
    "warm up": lambda: plain,
    "module": lambda: plain,
    "half": lambda: plain,
    "state dict": lambda: {f"module.{n}": t for n, t in plain.state_dict().items()},
    "tensordict": lambda: TensorDict.from_module(nn.ModuleDict({"model": plain})),
    "gathered": lambda: gathered,
    "iterator": gathered,
    "adapters": lambda: adapted,
    "second copy": lambda: {n: t + 0 for n, t in plain.state_dict().items()},
}

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

for form, make in forms.items():
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")                                                              # resets the peak
    before = memory("VmRSS")
    source, packer = open_source(make(), checkpoint), BucketPacker()
    dtype = torch.bfloat16 if form == "half" else torch.float32
    source.check_values()
    if source.one_shot:
        packed = packer.packed_stream(source.tensors(), bucket_bytes=20 * MIB, dtype_of=lambda spec: dtype)
    else:
        specs = [TensorSpec(name=s.name, shape=s.shape, dtype=dtype) for s in source.specs().values()]
        packed = packer.packed(plan_buckets(specs, bucket_bytes=20 * MIB), source.tensors)
    sent = sum(flat.nbytes for _, flat in packed)
    assert sent == checkpoint.nbytes * dtype.itemsize // 4, sent
    del source, packer, packed
    print(json.dumps([form, (memory("VmHWM") - before) / MIB]), flush=True)
"""


@pytest.fixture(scope="module")
def peak_extra_mib() -> dict[str, float]:
    """Peak resident memory beyond the model's own 304 MiB while it is packed in buckets of 20 MiB, by form."""
    pytest.importorskip("peft")
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT],
        # Freed memory goes back to the system at once, so that resident memory is memory in use.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(json.loads(line) for line in run.stdout.splitlines())


BUCKET_MIB, LARGEST_MIB, LAYER_MIB, TOLERANCE_MIB = 20, 48, 8, 8


@pytest.mark.parametrize("form", ["module", "half", "state dict", "tensordict", "gathered"])
def test_packing_needs_at_most_two_buckets_and_the_largest_tensor(peak_extra_mib: dict[str, float], form: str) -> None:
    assert peak_extra_mib[form] <= 2 * BUCKET_MIB + LARGEST_MIB + TOLERANCE_MIB


def test_merging_needs_one_more_copy_of_a_layer_and_a_stream_one_more_bucket(peak_extra_mib: dict[str, float]) -> None:
    assert peak_extra_mib["adapters"] <= 2 * BUCKET_MIB + 2 * LAYER_MIB + TOLERANCE_MIB
    assert peak_extra_mib["iterator"] <= 3 * BUCKET_MIB + LARGEST_MIB + TOLERANCE_MIB


def test_the_memory_measurement_detects_a_second_copy(peak_extra_mib: dict[str, float]) -> None:
    """Without this, the two tests above could pass on a broken measurement."""
    assert peak_extra_mib["second copy"] > 300
