"""A checkpoint is described by its files' headers; tensors that don't match it are refused by name and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from torchrl_sglang.errors import ConfigError, WeightCoverageError
from torchrl_sglang.weights.checkpoint.coverage import check_coverage
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.checkpoint.tensor_spec import TensorSpec
from torchrl_sglang.weights.checkpoint.values import check_finite, find_non_finite, finite_probe
from torchrl_sglang.weights.checkpoint.wire_dtype import wire_dtype

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def spec(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype=dtype)


def refused(*args: Any, **kwargs: Any) -> WeightCoverageError:
    with pytest.raises(WeightCoverageError) as error:
        check_coverage(*args, **kwargs)
    return error.value


# ------------------------------------------------------------------------------------------------ reading a checkpoint


def test_headers_give_names_shapes_and_dtypes_of_every_kind(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(2, 3, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        "fp8": torch.zeros(4).to(torch.float8_e4m3fn),
        "ints": torch.zeros(2, dtype=torch.int64),
        "flags": torch.zeros(2, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    specs = Checkpoint.read(tmp_path).specs
    assert {name: (s.shape, s.dtype) for name, s in specs.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    assert all(specs[name].nbytes == tensor.nbytes for name, tensor in tensors.items())


def test_only_files_that_the_index_names_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"stale": torch.zeros(3)}, tmp_path / "old.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(Checkpoint.read(tmp_path).specs) == {"a", "b"}
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match="lacks 1 of the files its index names, e.g. model-00002"):
        Checkpoint.read(tmp_path)


def test_adapters_and_second_copies_in_the_folder_are_ignored(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"lora": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    save_file({"other": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert set(Checkpoint.read(str(tmp_path)).specs) == {"a"}


@pytest.mark.parametrize(
    ("config", "names", "tied"),
    [
        ({"tie_word_embeddings": True}, ["embed", "lm_head.weight"], True),
        ({"tie_word_embeddings": False}, ["embed"], False),
        ({"text_config": {"tie_word_embeddings": True}}, ["embed"], True),
        ({}, ["embed"], True),
        ({}, ["embed", "language_model.lm_head.weight"], False),
    ],
)
def test_ties_are_read_from_the_config_or_derived_from_a_missing_output_embedding(
    tmp_path: Path, config: dict[str, Any], names: list[str], tied: bool
) -> None:
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Checkpoint.read(tmp_path).tied is tied


def test_a_quantised_checkpoint_is_recognised_by_its_config_or_its_dtypes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert Checkpoint.read(tmp_path).quantization == "float8_e4m3fn"
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    assert Checkpoint.read(tmp_path).quantization == "awq"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no weight files"),
        ({"pytorch_model.bin": b"x"}, r"only pytorch_model.bin: .*save_pretrained"),
        ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1"}, "cut short or a Git LFS pointer"),
        ({"model.safetensors": b""}, "cut short"),
        ({"model.safetensors": (60).to_bytes(8, "little") + b'{"a":'}, "cut short"),
        ({"model.safetensors.index.json": b"nonsense"}, "not valid JSON"),
    ],
)
def test_the_error_for_an_unreadable_folder_says_what_to_do(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Checkpoint.read(tmp_path)


def test_the_error_for_an_unknown_dtype_names_tensor_and_dtype(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(ConfigError, match="'w' has dtype F6_E2M3"):
        Checkpoint.read(tmp_path)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "nobody/has-this-model", "a/b/c", "not a name!"])
def test_the_error_for_a_missing_path_suggests_to_describe_the_checkpoint(path: str) -> None:
    with pytest.raises(ConfigError, match=r"Checkpoint.from_specs"):
        Checkpoint.read(path)


def test_a_hub_name_is_found_in_the_local_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert set(Checkpoint.read("org/tiny").specs) == {"w"}


# ------------------------------------------------------------------------------------------------------------ coverage


def test_missing_unknown_and_misshapen_tensors_are_listed_by_name() -> None:
    checkpoint = Checkpoint.from_specs([spec("a", 2), spec("b", 2), spec("layers.0.q_proj.weight", 2)])
    sent = [spec("a", 3), spec("layers.0.qproj.weight", 2)]
    error = refused(sent, checkpoint, server="http://one:1")
    assert error.missing == ("b", "layers.0.q_proj.weight")
    assert error.unknown == ("layers.0.qproj.weight",)
    assert error.mismatched == ("a: shape (3,) sent, (2,) in the checkpoint",)
    assert error.server_weights == {"http://one:1": "old"}
    assert "Did you mean 'layers.0.q_proj.weight'?" in str(error)
    assert "of http://one:1" in str(error)


def test_long_lists_are_shortened_with_their_count() -> None:
    checkpoint = Checkpoint.from_specs([spec(f"w{i}", 2) for i in range(25)])
    message = str(refused([spec("w0", 2)], checkpoint))
    assert "24 missing" in message
    assert "w10\n" in message
    assert "w11" not in message
    assert "... and 14 more" in message


@pytest.mark.parametrize(
    ("sent", "fits"),
    [(torch.bfloat16, True), (torch.float64, True), (torch.int32, False), (torch.float8_e4m3fn, False)],
)
def test_other_float_widths_fit_a_float_and_integers_and_scaled_floats_do_not(sent: torch.dtype, fits: bool) -> None:
    checkpoint = Checkpoint.from_specs([spec("w", 2)])
    if fits:
        check_coverage([spec("w", 2, dtype=sent)], checkpoint)
    else:
        assert " sent, float32 in the checkpoint" in str(refused([spec("w", 2, dtype=sent)], checkpoint))


def test_a_tied_output_embedding_is_optional_and_an_untied_one_is_required() -> None:
    names = [spec("embed", 2), spec("lm_head.weight", 2)]
    check_coverage(names[:1], Checkpoint.from_specs(names, tied=True))
    check_coverage(names, Checkpoint.from_specs(names, tied=True))
    assert refused(names[:1], Checkpoint.from_specs(names)).missing == ("lm_head.weight",)


def test_ignored_names_are_neither_required_nor_counted_as_unknown() -> None:
    checkpoint = Checkpoint.from_specs([spec("a", 2), spec("visual.0.w", 2)])
    check_coverage([spec("a", 2), spec("value_head.w", 1)], checkpoint, ignore=("visual.*", "value_head.*"))
    assert refused([spec("a", 2)], checkpoint, ignore=("Visual.*",)).missing == ("visual.0.w",)


def test_sending_nothing_is_refused() -> None:
    assert "no tensor at all" in str(refused([], Checkpoint.from_specs([spec("a", 2)])))


def test_a_quantised_checkpoint_accepts_only_its_own_names_and_dtypes(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn), "s": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    checkpoint = Checkpoint.read(tmp_path)
    check_coverage([spec("w", 2, 2, dtype=torch.float8_e4m3fn), spec("s", 1)], checkpoint)
    error = refused([spec("w", 2, 2, dtype=torch.bfloat16)], checkpoint)
    assert "quantised (fp8)" in str(error)
    assert "serve the unquantised checkpoint" in str(error)
    assert error.missing == ("s",)
    assert error.mismatched == ("w: dtype bfloat16 sent, float8_e4m3fn in the checkpoint",)


# --------------------------------------------------------------------------------------------------- dtype on the wire


def test_only_matrices_are_narrowed_and_nothing_is_widened() -> None:
    checkpoint = Checkpoint.from_specs(
        [
            spec("w", 4, 4, dtype=torch.bfloat16),
            spec("norm", 4, dtype=torch.bfloat16),
            spec("router", 2, 2),
            spec("ids", 2, 2, dtype=torch.int64),
        ]
    )

    def wire(name: str, source: torch.dtype, server: torch.dtype | None) -> torch.dtype:
        stored = checkpoint.specs[name]
        return wire_dtype(TensorSpec(name=name, shape=stored.shape, dtype=source), checkpoint, server)

    assert wire("w", torch.float32, torch.bfloat16) is torch.bfloat16
    assert wire("w", torch.float64, torch.float32) is torch.float32
    assert wire("w", torch.bfloat16, torch.float32) is torch.bfloat16
    assert wire("w", torch.bfloat16, torch.float16) is torch.bfloat16, "same size: the server casts"
    assert wire("w", torch.float32, None) is torch.float32
    assert wire("norm", torch.float32, torch.bfloat16) is torch.float32
    assert wire("router", torch.float32, torch.bfloat16) is torch.float32, "the checkpoint stores it in float32"
    assert wire("ids", torch.int64, torch.bfloat16) is torch.int64


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 1234, 4999])
def test_one_bad_element_is_found_at_any_position(dtype: torch.dtype, bad: float, position: int) -> None:
    values = torch.linspace(-1, 1, 5000)
    values[position] = bad
    tensor = values.to(dtype)
    if dtype is torch.float8_e4m3fn and bad == bad:
        tensor = values.nan_to_num(nan=0, posinf=torch.nan, neginf=torch.nan).to(dtype)  # this dtype has no infinity
    for laid_out in (tensor, tensor.view(50, 100), tensor.view(50, 100).t()):
        with pytest.raises(WeightCoverageError, match=r"w: 1 of 5000 elements NaN or infinite"):
            check_finite("w", laid_out)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40), st.sampled_from(FLOATS))
def test_finite_values_of_any_size_are_accepted(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values).to(dtype)
    if torch.isfinite(tensor).all():
        check_finite("w", tensor)
        assert find_non_finite([("w", tensor)]) == {}


def test_finite_values_whose_squares_overflow_are_accepted() -> None:
    large = torch.full((1000,), 1e30)
    assert not torch.isfinite(finite_probe(large)), "the probe no longer overflows here: simplify check_finite"
    check_finite("w", large)


def test_integers_and_empty_tensors_are_accepted() -> None:
    for tensor in (torch.arange(4), torch.zeros(0), torch.ones(2, dtype=torch.bool), torch.tensor(1.0)):
        check_finite("w", tensor)


def test_a_value_that_the_servers_dtype_cannot_represent_is_refused() -> None:
    tensor = torch.tensor([1.0, 70_000.0, -65_519.0])
    check_finite("w", tensor)
    check_finite("w", tensor, torch.bfloat16)
    with pytest.raises(WeightCoverageError, match="1 of 3 elements too large for the server's float16"):
        check_finite("w", tensor, torch.float16)
    assert torch.isfinite(torch.tensor(-65_519.0).to(torch.float16)), "it rounds down to the largest float16"


def test_all_bad_tensors_are_named_in_order_and_no_good_ones() -> None:
    bad = torch.tensor([0.0, torch.nan])
    problems = find_non_finite([("a", bad), ("b", torch.ones(2)), ("c", bad.half()), ("d", torch.full((9,), 1e30))])
    assert list(problems) == ["a", "c"]
