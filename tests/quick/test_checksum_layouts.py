"""What a rank of a server holds, as SGLang fuses and divides it; and SGLang's two hash functions."""

from __future__ import annotations

import hashlib

import pytest
import torch

from torchrl_sglang.weights.checksums.hashing import gpu_hash, main_memory_hash
from torchrl_sglang.weights.checksums.layouts import Place, layouts
from torchrl_sglang.weights.checksums.server_tensors import FusedUnit, canonical_name, fused_units, kind_of


def expected(unit: FusedUnit, parts: dict[str, torch.Tensor], rank: int, size: int, kv_heads: int = 4) -> torch.Tensor:
    """What a rank holds by the first, that is the expected, layout."""
    makes = layouts(unit, unit.name, parts, Place(tp_rank=rank, tp_size=size, kv_heads=kv_heads))
    return next(iter(makes.values()))()


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def unit_of(*names: str) -> FusedUnit:
    (unit,) = fused_units(names)
    return unit


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_query_key_and_value_are_one_tensor_with_each_ranks_heads(size: int, rank: int) -> None:
    names = [f"a.{part}_proj.weight" for part in "qkv"]
    parts = {names[0]: numbered(8, 3), names[1]: numbered(4, 3, start=100), names[2]: numbered(4, 3, start=200)}
    unit = unit_of(*reversed(names))
    assert (unit.name, unit.parts) == ("a.qkv_proj.weight", tuple(names))
    rows = [
        row
        for name in names
        for row in parts[name].tolist()[rank * len(parts[name]) // size :][: len(parts[name]) // size]
    ]
    assert expected(unit, parts, rank, size).tolist() == rows


def test_projections_that_the_checkpoint_has_fused_are_divided_part_by_part() -> None:
    """4 heads and 2 key/value heads of one row, as in Phi-3."""
    place = Place(tp_rank=1, tp_size=2, heads=4, kv_heads=2)
    for name, held in (("a.qkv_proj.weight", [2.0, 3.0, 5.0, 7.0]), ("m.gate_up_proj.weight", [2.0, 3.0, 6.0, 7.0])):
        makes = layouts(unit_of(name), name, {name: numbered(8, 1)}, place)
        assert held in [make().flatten().tolist() for make in makes.values()]


@pytest.mark.parametrize("rank", range(4))
def test_key_value_heads_are_repeated_where_there_are_fewer_than_ranks(rank: int) -> None:
    """2 heads of 2 rows for 4 ranks: ranks 0 and 1 hold the first."""
    names = [f"a.{part}_proj.weight" for part in "qkv"]
    parts = {names[0]: numbered(8, 1), names[1]: numbered(4, 1, start=100), names[2]: numbered(4, 1, start=200)}
    held = expected(unit_of(*names), parts, rank, 4, kv_heads=2).flatten().tolist()
    head = rank // 2 * 2
    assert held == [rank * 2, rank * 2 + 1, 100 + head, 101 + head, 200 + head, 201 + head]


def test_the_experts_of_a_mixture_are_two_tensors_with_each_ranks_rows_and_columns() -> None:
    names = [f"m.experts.{index}.{part}_proj.weight" for index in (0, 10, 2) for part in ("gate", "up", "down")]
    gate_up, down = fused_units(names)
    assert (gate_up.name, down.name) == ("m.experts.w13_weight", "m.experts.w2_weight")
    assert gate_up.parts == tuple(f"m.experts.{i}.{part}_proj.weight" for i in (0, 2, 10) for part in ("gate", "up"))
    parts = {name: numbered(4, 6, start=100 * index) for index, name in enumerate(gate_up.parts)}
    held = expected(gate_up, parts, 1, 2)
    assert held.shape == (3, 4, 6)
    for expert, index in enumerate((0, 2, 10)):
        gate, up = (parts[f"m.experts.{index}.{part}_proj.weight"] for part in ("gate", "up"))
        assert held[expert].tolist() == [*gate.tolist()[2:], *up.tolist()[2:]]
    parts = {name: numbered(6, 4, start=100 * index) for index, name in enumerate(down.parts)}
    held = expected(down, parts, 1, 2)
    assert held.tolist() == [[row[2:] for row in parts[name].tolist()] for name in down.parts]


@pytest.mark.parametrize(
    ("rows", "size", "per_rank"), [(320, 2, 160), (100, 1, 128), (100, 2, 64), (150, 4, 48), (100, 3, 64)]
)
def test_a_vocabulary_is_padded_to_a_multiple_of_64_rows_and_divided(rows: int, size: int, per_rank: int) -> None:
    name = "model.embed_tokens.weight"
    table = numbered(rows, 2, start=1)
    held = torch.cat([expected(unit_of(name), {name: table}, rank, size) for rank in range(size)])
    assert held.shape == (per_rank * size, 2)
    assert held[:rows].tolist() == table.tolist()
    assert held[rows:].abs().sum() == 0
    bias = numbered(rows, start=1)
    name = "lm_head.bias"
    held = torch.cat([expected(unit_of(name), {name: bias}, rank, size) for rank in range(size)])
    assert held.tolist() == [*bias.tolist(), *[0.0] * (per_rank * size - rows)]


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("a.o_proj.weight", [[1.0], [3.0]]),
        ("a.o_proj.bias", [[0.0, 1.0], [2.0, 3.0]]),
        ("mlp.gate.weight", [[0.0, 1.0], [2.0, 3.0]]),
    ],
)
def test_other_tensors_are_divided_by_columns_or_whole(name: str, held: list[list[float]]) -> None:
    assert expected(unit_of(name), {name: numbered(2, 2)}, 1, 2).tolist() == held


def test_a_tensor_of_unknown_model_code_may_be_held_in_any_plain_layout() -> None:
    name = "h.0.attn.c_attn.weight"
    tensor = numbered(4, 2)
    made = [
        make().tolist() for make in layouts(unit_of(name), name, {name: tensor}, Place(tp_rank=1, tp_size=2)).values()
    ]
    for layout in (tensor, tensor[2:], tensor[:, 1:], tensor.T, tensor.T[1:], tensor.T[:, 2:]):
        assert layout.tolist() in made


def test_a_tied_output_embedding_may_be_a_tensor_of_its_own() -> None:
    (unit,) = fused_units(["model.embed_tokens.weight"], tied=True)
    assert unit.server_names == ("model.embed_tokens.weight", "lm_head.weight")
    assert fused_units(["model.embed_tokens.weight"])[0].server_names == ("model.embed_tokens.weight",)


def test_names_without_a_layers_number_and_without_wrappers() -> None:
    assert kind_of("model.layers.3.mlp.experts.12.w1.weight") == "model.layers.N.mlp.experts.N.w1.weight"
    assert canonical_name("model.language_model.layers.0.x") == canonical_name("language_model.model.layers.0.x")


def test_sha256_of_the_bytes_row_by_row() -> None:
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    bytes_in_order = tensor.T.contiguous().view(torch.uint8).flatten().tolist()
    assert main_memory_hash(tensor.T) == hashlib.sha256(bytes(bytes_in_order)).digest()[:8].hex()


@pytest.mark.parametrize("num_bytes", [0, 2, 4, 6, 4 * 8192, 4 * 8192 + 4, 4 * 20_001 + 2])
def test_the_hash_of_a_tensor_on_a_gpu_is_that_of_its_definition(num_bytes: int) -> None:
    """Against a word-by-word transcription of SGLang's kernel; no GPU has computed it here."""
    generator = torch.Generator().manual_seed(3)
    tensor = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    assert gpu_hash(tensor.view(torch.bfloat16)) == word_by_word(bytes(tensor.tolist()))


def word_by_word(data: bytes) -> str:
    mask = 2**32 - 1

    def rotate(x: int, by: int) -> int:
        return (x << by | x >> (32 - by)) & mask

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x85EBCA6B & mask
        x ^= x >> 13
        x = x * 0xC2B2AE35 & mask
        return x ^ (x >> 16)

    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    if not words:
        return "0" * 16
    seed_1, seed_2 = 0x243F6A88, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & mask
    total = 0
    for start in range(0, len(words), 8192):
        sum_1 = sum_2 = 0
        for index in range(start, min(start + 8192, len(words))):
            sum_1 += mix(words[index] ^ (index * 0x27D4EB2D + seed_1 & mask) ^ rotate(index, 15))
            sum_2 += mix(words[index] ^ (index * 0x165667B1 + seed_2 & mask) ^ rotate(index, 13))
        size = len(words) * 4 & mask
        total += mix((sum_1 & mask) ^ size) << 32 | mix((sum_2 & mask) ^ size)
    x = total & 2**64 - 1
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & 2**64 - 1
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & 2**64 - 1
    return f"{x ^ x >> 31:016x}"
