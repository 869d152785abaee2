"""A real server that does not take the new weights is detected by the default verification, in half precision too.

Every push changes all tensors by less than the log-probs show: in bfloat16 the scores alone accept the old weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.stale_tensors import keep_old, put_back_on_one_rank
from torchrl_sglang import SyncConfig, WeightSync, WeightUpdateError
from torchrl_sglang.client import SGLangClient
from torchrl_sglang.pool import SGLangPool
from torchrl_sglang.server import SGLangServer
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.source.factory import open_source

Dtype = Literal["float32", "bfloat16"]

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
IN_DEFAULT_SUITE = {("llama", "float32", 1): "pristine_server"}
two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")


def all_rows() -> list[Any]:
    rows = []
    for family in FAMILIES:
        for dtype in ("float32", "bfloat16"):
            for tp_size in (1, 2):
                marks = [two_cores] if tp_size == 2 else []
                if (family, dtype, tp_size) not in IN_DEFAULT_SUITE:
                    marks.append(pytest.mark.slow)
                rows.append(pytest.param(family, dtype, tp_size, marks=marks, id=f"{family}-{dtype}-tp{tp_size}"))
    return rows


@pytest.fixture
def served(
    request: pytest.FixtureRequest,
    special_server: Callable[..., SGLangServer],
    make_model: Callable[..., Path],
    tiny_llama: Path,
    family: str,
    dtype: Dtype,
    tp_size: int,
) -> tuple[str, Path]:
    """A server's address and its checkpoint."""
    if IN_DEFAULT_SUITE.get((family, dtype, tp_size)) == "pristine_server":
        return request.getfixturevalue("pristine_server").url, tiny_llama
    folder = make_model(arch=family, dtype=dtype, tied=family == "qwen2")
    return special_server(model=str(folder), dtype=dtype, tp_size=tp_size).url, folder


def tensors_of(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Copies of the tensors, under the checkpoint's names."""
    source = open_source(model, Checkpoint.read(folder))
    return {name: tensor.clone() for name, tensor in source.tensors()}


@torch.no_grad()
def step(model: Any) -> None:
    for parameter in model.parameters():
        parameter.mul_(1 + 1 / 128)  # one unit in the last place of bfloat16


MISSED: dict[str, Callable[[str, int], bool]] = {
    "everything, at the first sync": lambda name, bucket: True,
    "one bucket": lambda name, bucket: bucket == 2,
    "a norm": lambda name, bucket: name == "model.norm.weight",
    "one of several that are fused": lambda name, bucket: name.endswith("1.self_attn.k_proj.weight"),
    "one matrix, or one of each expert": lambda name, bucket: name.endswith("down_proj.weight") and "layers.1" in name,
    "the embedding": lambda name, bucket: name.endswith("embed_tokens.weight"),
    "everything": lambda name, bucket: True,
}


@pytest.mark.timeout(480)
@pytest.mark.parametrize(("family", "dtype", "tp_size"), all_rows())
def test_a_server_that_keeps_old_values_is_detected_at_that_sync(
    served: tuple[str, Path], dtype: Dtype, tp_size: int
) -> None:
    url, folder = served
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    pool = SGLangPool([SGLangClient(url)])
    with closing(WeightSync(pool, SyncConfig(bucket_bytes=60_000))) as sync:
        old = tensors_of(model, folder)
        for what, is_missed in MISSED.items():
            step(model)
            keep_old(sync, old, is_missed)
            with pytest.raises(WeightUpdateError, match=f"{url} does not hold what was sent") as caught:
                sync.push(model)
            assert caught.value.server_weights == {url: "mixed"}, what
            assert list(pool.quarantined) == [url], what
            keep_old(sync, old, lambda name, bucket: False)
            report = sync.push(model)
            assert report is not None
            assert report.not_compared == {}, what
            assert report.num_checksums >= tp_size * 15
            assert not pool.quarantined
            old = tensors_of(model, folder)
        name, other = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1))
        step(model)
        new = tensors_of(model, folder)
        exchanged = {name: new[other], other: new[name]}
        keep_old(sync, exchanged, lambda each, bucket: each in exchanged)
        with pytest.raises(WeightUpdateError, match="does not hold what was sent"):
            sync.push(model)
        keep_old(sync, new, lambda each, bucket: False)
        sync.push(model)
        old = new
        step(model)
        put_back_on_one_rank(sync, name, old[name], tensors_of(model, folder)[name], rank=tp_size - 1)
        with pytest.raises(WeightUpdateError, match="does not hold what was sent") as caught:
            sync.push(model)
        assert name + (" (rank 1)" if tp_size == 2 else "") in str(caught.value)
