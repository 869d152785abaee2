"""Every byte is where the plan puts it, no tensor is lost, and packing allocates no more than two buckets."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.weights.buckets.layout import Bucket, plan_buckets, transfer_units, unit_key
from torchrl_sglang.weights.buckets.packing import BucketPacker
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn]
MODULES = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "q_a_proj", "q_a_layernorm", "wkv", "kv_a_proj_with_mqa")),
    *(f"mlp.{name}" for name in ("gate_proj", "experts.0.up_proj", "experts.1.up_proj")),
]


@st.composite
def spec_lists(draw: st.DrawFn) -> list[TensorSpec]:
    """Layers with some modules of real models, in any order, shape and dtype."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in range(draw(st.integers(0, 4))):
        for module in draw(st.lists(st.sampled_from(MODULES), unique=True)):
            for kind in draw(st.sampled_from([["weight"], ["weight", "bias"], ["weight", "weight_scale_inv"]])):
                names.append(f"model.layers.{layer}.{module}.{kind}")
    names = draw(st.permutations(names)) if draw(st.booleans()) else names
    shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
    return [TensorSpec(name=name, shape=draw(shapes), dtype=draw(st.sampled_from(DTYPES))) for name in names]


def values(spec: TensorSpec) -> torch.Tensor:
    """Random bytes, seeded by the tensor's name."""
    generator = torch.Generator().manual_seed(hash(spec.name) % 2**31)
    raw = torch.randint(0, 255, (spec.nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(spec.dtype).view(spec.shape) if spec.numel else torch.zeros(spec.shape, dtype=spec.dtype)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and _raw(one).equal(_raw(other))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------- plan


@given(spec_lists(), st.integers(1, 2000))
def test_every_tensor_is_in_one_bucket_aligned_and_without_gaps(specs: list[TensorSpec], bucket_bytes: int) -> None:
    plan = plan_buckets(specs, bucket_bytes=bucket_bytes)
    assert sorted(name for bucket in plan for name in bucket.names) == sorted(spec.name for spec in specs)
    by_name = {spec.name: spec for spec in specs}
    for bucket in plan:
        end = 0
        for slot in bucket.slots:
            spec = by_name[slot.name]
            assert (slot.shape, slot.dtype, slot.nbytes) == (spec.shape, spec.dtype, spec.nbytes)
            assert slot.offset == end
            assert slot.offset % slot.dtype.itemsize == 0
            end += slot.nbytes
        assert bucket.nbytes == end


@given(spec_lists(), st.integers(1, 2000))
def test_a_bucket_exceeds_its_size_only_for_one_unit(specs: list[TensorSpec], bucket_bytes: int) -> None:
    for bucket in plan_buckets(specs, bucket_bytes=bucket_bytes):
        assert bucket.nbytes <= bucket_bytes or len({unit_key(name) for name in bucket.names}) == 1


@given(spec_lists(), st.integers(1, 2000))
def test_a_transfer_unit_is_in_one_bucket(specs: list[TensorSpec], bucket_bytes: int) -> None:
    bucket_of = {
        name: index
        for index, bucket in enumerate(plan_buckets(specs, bucket_bytes=bucket_bytes))
        for name in bucket.names
    }
    for unit in transfer_units(specs):
        assert len({bucket_of[spec.name] for spec in unit}) == 1
    for name, index in bucket_of.items():
        sibling = name.replace("q_a_proj", "kv_a_proj_with_mqa")
        assert bucket_of.get(sibling, index) == index


@given(spec_lists(), st.integers(1, 2000))
def test_tensors_of_one_dtype_keep_the_trainers_order(specs: list[TensorSpec], bucket_bytes: int) -> None:
    same_dtype = [
        TensorSpec(name=f"w{index}", shape=spec.shape, dtype=torch.float32) for index, spec in enumerate(specs)
    ]
    plan = plan_buckets(same_dtype, bucket_bytes=bucket_bytes)
    assert [name for bucket in plan for name in bucket.names] == [spec.name for spec in same_dtype]


def model_specs(layers: int = 6) -> list[TensorSpec]:
    """Shapes of a small Llama: 57 kB of embedding, 14 kB a layer."""
    shapes = {"input_layernorm": (48,), "self_attn.q_proj": (24, 48), "self_attn.k_proj": (8, 48),
              "self_attn.v_proj": (8, 48), "self_attn.o_proj": (48, 24), "post_attention_layernorm": (48,),
              "mlp.gate_proj": (16, 48), "mlp.up_proj": (16, 48), "mlp.down_proj": (48, 16)}  # fmt: skip
    specs = [TensorSpec(name="model.embed_tokens.weight", shape=(300, 48), dtype=torch.float32)]
    for layer in range(layers):
        for name, shape in shapes.items():
            full_name = f"model.layers.{layer}.{name}.weight"
            specs.append(TensorSpec(name=full_name, shape=shape, dtype=torch.float32))
    return [*specs, TensorSpec(name="model.norm.weight", shape=(48,), dtype=torch.float32)]


def test_layers_that_fit_into_a_bucket_are_not_divided() -> None:
    plan = plan_buckets(model_specs(), bucket_bytes=66_000)
    for layer in range(6):
        holders = [b for b in plan if any(name.startswith(f"model.layers.{layer}.") for name in b.names)]
        assert len(holders) == 1
    assert len(plan) == 3


def test_a_layer_larger_than_a_bucket_is_divided_between_its_blocks_first() -> None:
    plan = plan_buckets(model_specs(1), bucket_bytes=14_000)
    holders = {name: index for index, bucket in enumerate(plan) for name in bucket.names}
    attention = [holders[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkvo"]
    mlp = [holders[f"model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up", "down")]
    assert len(set(attention)) == len(set(mlp)) == 1


def test_buckets_are_at_least_half_full_on_average() -> None:
    specs = model_specs(40)
    total = sum(spec.nbytes for spec in specs)
    for bucket_bytes in (20_000, 66_000, 150_000):
        assert len(plan_buckets(specs, bucket_bytes=bucket_bytes)) <= 2 * total / bucket_bytes + 1


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="two tensors are called 'model.norm.weight'"):
        plan_buckets([*model_specs(1), model_specs(1)[-1]], bucket_bytes=100)
    with pytest.raises(ConfigError, match="must be positive"):
        plan_buckets(model_specs(1), bucket_bytes=0)
    assert plan_buckets([], bucket_bytes=1) == []


# ------------------------------------------------------------------------------------------------------------- packing


@given(spec_lists(), st.integers(1, 2000))
@settings(deadline=None)
def test_every_byte_is_where_the_plan_puts_it(specs: list[TensorSpec], bucket_bytes: int) -> None:
    by_name = {spec.name: values(spec) for spec in specs}
    plan = plan_buckets(specs, bucket_bytes=bucket_bytes)
    received = {}
    for bucket, flat in BucketPacker().packed(plan, lambda names: ((name, by_name[name]) for name in names)):
        assert flat.dtype is torch.uint8
        assert flat.shape == (bucket.nbytes,)
        assert flat.is_contiguous()
        raw = bytes(flat.tolist())
        for slot, view in zip(bucket.slots, bucket.views(flat), strict=True):
            assert raw[slot.offset : slot.offset + slot.nbytes] == bytes(_raw(by_name[slot.name]).tolist())
            received[slot.name] = view.clone()
    assert received.keys() == by_name.keys()
    assert all(same_bytes(received[name], tensor) for name, tensor in by_name.items())


@given(spec_lists(), st.integers(1, 2000), st.booleans())
@settings(deadline=None)
def test_a_stream_in_any_order_is_packed_completely_and_its_transfer_units_stay_whole(
    specs: list[TensorSpec], bucket_bytes: int, known: bool
) -> None:
    by_name = {spec.name: values(spec) for spec in specs}
    received, bucket_of = {}, {}
    packed = BucketPacker().packed_stream(
        iter(by_name.items()),
        bucket_bytes=bucket_bytes,
        dtype_of=lambda spec: spec.dtype,
        expected={name: TensorSpec.of(name, tensor) for name, tensor in by_name.items()} if known else None,
    )
    for index, (bucket, flat) in enumerate(packed):
        for name, view in zip(bucket.names, bucket.views(flat), strict=True):
            received[name], bucket_of[name] = view.clone(), index
        assert bucket.nbytes <= bucket_bytes or len({unit_key(name) for name in bucket.names}) == 1
    assert received.keys() == by_name.keys()
    assert all(same_bytes(received[name], tensor) for name, tensor in by_name.items())
    for unit in transfer_units(specs) if known else []:
        assert len({bucket_of[spec.name] for spec in unit}) == 1


def test_tensors_are_cast_as_they_are_copied_and_need_not_be_contiguous() -> None:
    source = torch.randn(6, 4).t()
    bucket = Bucket.of([TensorSpec(name="w", shape=(4, 6), dtype=torch.bfloat16)])
    flat = BucketPacker().pack(bucket, [("w", source)])
    assert torch.equal(bucket.views(flat)[0], source.to(torch.bfloat16))


def test_a_packed_bucket_is_valid_while_the_next_is_packed_and_its_buffer_is_reused() -> None:
    specs = [TensorSpec(name=f"w{i}", shape=(1000 + i % 2,), dtype=torch.bfloat16) for i in range(6)]
    plan = plan_buckets(specs, bucket_bytes=2002)
    packer = BucketPacker()
    addresses: list[int] = []
    previous: tuple[int, torch.Tensor] | None = None
    packed = packer.packed(plan, lambda names: ((n, torch.full(specs[int(n[1:])].shape, float(n[1:]))) for n in names))
    for index, (_, flat) in enumerate(packed):
        if previous is not None:
            assert (previous[1].view(torch.bfloat16) == float(previous[0])).all()
        previous = index, flat
        addresses.append(flat.data_ptr())
    assert len(set(addresses)) == 2
    assert packer.nbytes == 2000 + 2002
    packer.release()
    assert packer.nbytes == 0


def test_a_tensor_with_a_bucket_of_its_own_is_not_copied() -> None:
    tensor = torch.randn(40, 5)
    packer = BucketPacker()
    flat = packer.pack(Bucket.of([TensorSpec(name="w", shape=(40, 5), dtype=torch.float32)]), [("w", tensor)])
    assert flat.data_ptr() == tensor.data_ptr()
    assert (flat.dtype, flat.shape) == (torch.uint8, (800,))
    assert packer.nbytes == 0
    for other, dtype in ((tensor.t().contiguous().t(), torch.float32), (tensor, torch.bfloat16)):
        flat = packer.pack(Bucket.of([TensorSpec(name="w", shape=(40, 5), dtype=dtype)]), [("w", other)])
        assert flat.data_ptr() != other.data_ptr()
        assert torch.equal(flat.view(dtype).view(40, 5), tensor.to(dtype))


def test_a_wrong_tensor_is_refused_instead_of_broadcast_into_place() -> None:
    bucket = Bucket.of([TensorSpec(name="w", shape=(4, 6), dtype=torch.float32)])
    for pairs, message in (
        ([("w", torch.zeros(1))], "wants shape"),
        ([("v", torch.zeros(4, 6))], "got 'v'"),
        ([], "ended before 'w'"),
    ):
        with pytest.raises(ConfigError, match=message):
            BucketPacker().pack(bucket, pairs)
    with pytest.raises(ConfigError, match="'v', which is in no bucket"):
        list(BucketPacker().packed([bucket], lambda _: [("w", torch.zeros(4, 6)), ("v", torch.zeros(1))]))


def test_an_iterator_that_is_not_read_to_its_end_is_closed() -> None:
    closed = threading.Event()

    def pairs(names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            yield from ((name, torch.zeros(8)) for name in names)
        finally:
            closed.set()

    specs = [TensorSpec(name=f"w{i}", shape=(8,), dtype=torch.float32) for i in range(4)]
    packed = BucketPacker().packed(plan_buckets(specs, bucket_bytes=32), pairs)
    next(packed)
    assert not closed.is_set()
    packed.close()
    assert closed.is_set()


def test_copying_lets_other_threads_run() -> None:
    """Packing overlaps a broadcast only if the copy releases Python's global lock."""
    tensors = {name: torch.zeros(2**26, dtype=torch.uint8) for name in "ab"}
    layout = Bucket.of(TensorSpec(name=name, shape=(2**26,), dtype=torch.uint8) for name in tensors)
    packer = BucketPacker()
    packer.pack(layout, tensors.items())
    packer.pack(layout, tensors.items())
    steps, steps_inside = [0], [0]
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            steps[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    # With a switch interval longer than the test, only an explicit release can let the other thread run.
    sys.setswitchinterval(600)
    try:
        counter.start()
        before = steps[0]
        for _ in range(20):
            packer.pack(layout, tensors.items())
        steps_inside[0] = steps[0] - before
    finally:
        done.set()
        sys.setswitchinterval(interval)
        counter.join()
    assert steps_inside[0] > 0
