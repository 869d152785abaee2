"""Every form in which a trainer may pass its weights yields exactly the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams, TensorDictSequential
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torchrl.modules.llm import TransformersWrapper
from torchrl.weight_update.weight_sync_schemes import WeightStrategy

from torchrl_sglang.errors import ConfigError, WeightCoverageError
from torchrl_sglang.weights.checkpoint.coverage import check_coverage
from torchrl_sglang.weights.checkpoint.headers import Checkpoint
from torchrl_sglang.weights.source.factory import open_source


@pytest.fixture(scope="module", params=["llama-tied", "qwen2"])
def folder(request: pytest.FixtureRequest, make_model: Any) -> Path:
    arch, _, tied = request.param.partition("-")
    return make_model(arch=arch, tied=bool(tied))


@pytest.fixture
def model(folder: Path) -> transformers.PreTrainedModel:
    return load(folder)


def load(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_sends_the_checkpoint(weights: Any, folder: Path, **kwargs: Any) -> None:
    """The source's specs and its tensors have the names, shapes and values of the checkpoint's file."""
    checkpoint = Checkpoint.read(folder)
    source = open_source(weights, checkpoint, **kwargs)
    specs = source.specs()
    check_coverage(specs, checkpoint)
    source.check_values()
    stored = load_file(folder / "model.safetensors")
    sent = dict(source.tensors())
    assert sent.keys() == specs.keys() == stored.keys()
    for name, tensor in sent.items():
        assert not tensor.requires_grad
        assert (tuple(tensor.shape), tensor.dtype) == (specs[name].shape, specs[name].dtype)
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)


class Holder(nn.Module):
    """A user's wrapper whose attribute has the same name as the first segment of checkpoint names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def wrapped_for_torchrl(model: nn.Module, folder: Path) -> TransformersWrapper:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return TransformersWrapper(model, tokenizer=tokenizer, generate=False, input_mode="tokens", pad_output=False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_plain_model_is_sent_under_its_checkpoint_names(make_model: Any, arch: str, tied: bool) -> None:
    folder = make_model(arch=arch, tied=tied)
    assert_sends_the_checkpoint(load(folder), folder)


def test_a_model_inside_wrappers_is_found(model: nn.Module, folder: Path) -> None:
    assert_sends_the_checkpoint(wrapped_for_torchrl(model, folder), folder)
    assert_sends_the_checkpoint(TensorDictModule(model, in_keys=["x"], out_keys=["y"]), folder)
    assert_sends_the_checkpoint(TensorDictSequential(TensorDictModule(Holder(Holder(model)), ["x"], ["y"])), folder)


def test_a_compiled_model_is_unwrapped(model: nn.Module, folder: Path) -> None:
    assert_sends_the_checkpoint(torch.compile(model), folder)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert any("._orig_mod." in name for name, _ in model.named_parameters())
    assert_sends_the_checkpoint(model, folder)
    assert_sends_the_checkpoint(model.state_dict(), folder)


def test_a_model_in_real_ddp_is_unwrapped_and_its_process_group_left_alone(model: nn.Module, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for weights in (parallel, torch.compile(parallel), parallel.state_dict(), TensorDict.from_module(parallel)):
            assert_sends_the_checkpoint(weights, folder)
        assert open_source(parallel, Checkpoint.read(folder)).module is model
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("as_torchrl_does", [False, True])
def test_a_nested_tensordict_of_any_wrapper_is_sent(model: nn.Module, folder: Path, as_torchrl_does: bool) -> None:
    extract = WeightStrategy("tensordict").extract_weights if as_torchrl_does else TensorDict.from_module
    for weights in (extract(model), extract(wrapped_for_torchrl(model, folder)), extract(Holder(model))):
        assert_sends_the_checkpoint(weights, folder)


def test_a_tensordict_of_copies_is_sent_although_it_tells_neither_ties_nor_buffers(
    model: nn.Module, folder: Path
) -> None:
    weights = TensorDict.from_module(wrapped_for_torchrl(model, folder))
    assert_sends_the_checkpoint(weights.data.clone(), folder)
    assert_sends_the_checkpoint(weights.detach().clone().flatten_keys("."), folder)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "actor.", "model.", "module._orig_mod.model."])
def test_a_state_dict_with_any_prefix_is_sent(model: nn.Module, folder: Path, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    assert_sends_the_checkpoint(state, folder)
    assert_sends_the_checkpoint(dict(reversed(state.items())), folder)


def test_a_state_dict_without_the_tied_output_embedding_is_sent(model: nn.Module, folder: Path) -> None:
    assert_sends_the_checkpoint(dict(model.named_parameters()), folder)


def test_a_function_that_returns_an_iterator_is_sent(model: nn.Module, folder: Path) -> None:
    assert_sends_the_checkpoint(lambda: iter(model.state_dict().items()), folder)
    assert_sends_the_checkpoint(lambda: ((f"actor.{n}", t) for n, t in model.named_parameters()), folder)
    assert_sends_the_checkpoint(list(model.state_dict().items()), folder)


def test_an_iterator_gives_all_its_tensors_once(model: nn.Module, folder: Path) -> None:
    checkpoint = Checkpoint.read(folder)
    source = open_source(iter(model.state_dict().items()), checkpoint)
    assert source.one_shot
    source.check_values()
    assert source.specs().keys() == checkpoint.specs.keys()
    stored = load_file(folder / "model.safetensors")
    sent = dict(source.tensors())
    assert sent.keys() == stored.keys()
    assert all(torch.equal(sent[name], stored[name]) for name in stored)
    with pytest.raises(ConfigError, match="already sent"):
        next(source.tensors())


def test_an_iterator_is_refused_at_the_tensor_that_does_not_fit(model: nn.Module, folder: Path) -> None:
    checkpoint = Checkpoint.read(folder)
    names = list(checkpoint.specs)

    def pairs(**changes: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = {**{n: model.state_dict()[n] for n in names}, **changes}
        yield from ((name, tensor) for name, tensor in tensors.items() if tensor is not None)

    last = names[-1]
    with pytest.raises(WeightCoverageError, match="1 missing") as missing:
        list(open_source(pairs(**{last: None}), checkpoint).tensors())
    assert missing.value.missing == (last,)
    with pytest.raises(WeightCoverageError, match="1 unknown") as unknown:
        list(open_source(pairs(nobody_knows=torch.zeros(1)), checkpoint).tensors())
    assert unknown.value.unknown == ("nobody_knows",)
    with pytest.raises(WeightCoverageError, match=r"shape \(1, 3\) sent"):
        list(open_source(pairs(**{last: torch.zeros(1, 3)}), checkpoint).tensors())
    with pytest.raises(WeightCoverageError, match="twice"):
        list(open_source([*pairs(), (last, torch.zeros(1))].__iter__(), checkpoint).tensors())
    source = open_source(pairs(**{last: torch.full(checkpoint.specs[last].shape, torch.nan)}), checkpoint)
    source.check_values()
    got = []
    with pytest.raises(WeightCoverageError, match="NaN"):
        for name, _ in source.tensors():
            got.append(name)
    assert got == names[:-1]


def test_chosen_tensors_come_in_the_requested_order(model: nn.Module, folder: Path) -> None:
    source = open_source(model, Checkpoint.read(folder))
    chosen = list(reversed(source.specs()))[2:9:2]
    assert [name for name, _ in source.tensors(chosen)] == chosen
    with pytest.raises(ConfigError, match="did you mean|Did you mean"):
        next(source.tensors(["model.embed_token.weight"]))


def test_only_parameters_that_are_trained_count_as_trainable(model: nn.Module, folder: Path) -> None:
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    for weights in (model, TensorDict.from_module(Holder(model))):
        specs = open_source(weights, Checkpoint.read(folder)).specs().values()
        trainable = [spec.name for spec in specs if spec.trainable]
        assert trainable == [f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")]


def test_an_open_source_reads_the_values_of_later_optimiser_steps(model: nn.Module, folder: Path) -> None:
    source = open_source(model, Checkpoint.read(folder))
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    assert torch.equal(dict(source.tensors(["model.norm.weight"]))["model.norm.weight"], model.model.norm.weight)


def test_the_transformers_model_is_found_for_verification(model: nn.Module, folder: Path) -> None:
    checkpoint = Checkpoint.read(folder)
    for weights in (model, Holder(model), torch.compile(model), wrapped_for_torchrl(model, folder)):
        assert open_source(weights, checkpoint).module is model
    assert open_source(model.state_dict(), checkpoint).module is None


def test_two_models_that_fit_equally_well_are_refused(folder: Path) -> None:
    both = nn.ModuleDict({"actor": load(folder), "critic": load(folder)})
    checkpoint = Checkpoint.read(folder)
    for weights in (both, both.state_dict(), TensorDict.from_module(both)):
        with pytest.raises(ConfigError, match="guess"):
            open_source(weights, checkpoint)
    assert_sends_the_checkpoint(both, folder, ignore=("critic.*",))
    assert_sends_the_checkpoint(both.state_dict(), folder, ignore=("critic.*",))


def test_tensors_that_the_checkpoint_lacks_are_refused_unless_ignored(model: nn.Module, folder: Path) -> None:
    model.value_head = nn.Linear(64, 1)
    checkpoint = Checkpoint.read(folder)
    for weights in (model, Holder(model), TensorDict.from_module(model), model.state_dict()):
        with pytest.raises(WeightCoverageError) as refused:
            check_coverage(open_source(weights, checkpoint).specs(), checkpoint)
        assert set(refused.value.unknown) == {"value_head.weight", "value_head.bias"}
        assert_sends_the_checkpoint(weights, folder, ignore=("*value_head*",))


def test_a_value_head_beside_the_model_is_refused_unless_ignored(model: nn.Module, folder: Path) -> None:
    both = nn.ModuleDict({"policy": model, "value": nn.Linear(64, 1)})
    checkpoint = Checkpoint.read(folder)
    with pytest.raises(WeightCoverageError) as refused:
        check_coverage(open_source(both, checkpoint).specs(), checkpoint)
    assert set(refused.value.unknown) == {"value.weight", "value.bias"}
    assert_sends_the_checkpoint(both, folder, ignore=("value.*",))


def test_a_custom_model_is_sent_by_its_name_map() -> None:
    checkpoint = Checkpoint.from_specs({"model.a.weight": ((2, 3), torch.float32), "model.b": ((2,), torch.float32)})
    custom = nn.ModuleDict({"first": nn.Linear(3, 2)})
    name_map = {"first.weight": "model.a.weight", "first.bias": "model.b"}
    for weights in (custom, custom.state_dict(), lambda: custom.named_parameters(), iter(custom.named_parameters())):
        source = open_source(weights, checkpoint, name_map=name_map)
        check_coverage(source.specs(), checkpoint)
        sent = dict(source.tensors())
        assert torch.equal(sent["model.a.weight"], custom["first"].weight)
        assert torch.equal(sent["model.b"], custom["first"].bias)
    with pytest.raises(ConfigError, match="name_map names tensors that the weights don't have: frist"):
        open_source(custom, checkpoint, name_map={"frist.weight": "model.a.weight"})


def test_two_tensors_for_one_name_are_refused() -> None:
    checkpoint = Checkpoint.from_specs({"w": ((2,), torch.float32), "v": ((2,), torch.float32)})
    weights = {"w": torch.zeros(2), "v": torch.zeros(2), "other": torch.ones(2)}
    with pytest.raises(ConfigError, match="both map to 'w'"):
        open_source(weights, checkpoint, name_map={"other": "w"})


@pytest.mark.parametrize("empty", [{}, TensorDict({}, []), nn.Identity(), TensorDict({"a": TensorDict({}, [])}, [])])
def test_an_empty_collection_is_refused(empty: Any) -> None:
    with pytest.raises(ConfigError, match="hold no tensor"):
        open_source(empty, Checkpoint.from_specs({"w": ((2,), torch.float32)}))


@pytest.mark.parametrize("wrong", [3, None, {"w": [1.0, 2.0]}, {3: torch.ones(2)}])
def test_weights_of_an_unsupported_type_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"can't read weights from|must be tensors|must be named|must give"):
        list(open_source(wrong, Checkpoint.from_specs({"w": ((2,), torch.float32)})).tensors())


def test_parameters_whose_values_are_not_on_this_rank_are_refused_with_advice(folder: Path) -> None:
    checkpoint = Checkpoint.read(folder)
    model = load(folder)
    model.model.norm.weight.ds_shape = torch.Size([64])  # how DeepSpeed marks a partitioned parameter
    with pytest.raises(ConfigError, match=r"model\.norm\.weight' is partitioned by DeepSpeed.*GatheredParameters"):
        open_source(model, checkpoint)
    with torch.device("meta"):
        empty = type(model)(model.config)
    for weights in (empty, empty.state_dict()):
        with pytest.raises(ConfigError, match="meta device"):
            open_source(weights, checkpoint)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_and_its_gathered_state_dict_is_sent(folder: Path, use_orig_params: bool) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(load(folder), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        with pytest.raises(ConfigError, match="FSDP1"):
            open_source(sharded, Checkpoint.read(folder))
        assert_sends_the_checkpoint(sharded.state_dict(), folder)
    finally:
        dist.destroy_process_group()


def test_tensordict_params_are_sent(model: nn.Module, folder: Path) -> None:
    assert_sends_the_checkpoint(TensorDictParams(TensorDict.from_module(model), no_convert=True), folder)


def test_an_output_embedding_that_differs_from_its_tie_is_refused_and_a_copy_is_not(make_model: Any) -> None:
    folder = make_model(arch="llama", tied=True)
    state = {name: tensor.clone() for name, tensor in load(folder).state_dict().items()}
    assert_sends_the_checkpoint(state, folder)
    state["lm_head.weight"][0, 0] += 1
    with pytest.raises(WeightCoverageError, match=r"ties lm_head\.weight to its input embedding") as refused:
        open_source(state, Checkpoint.read(folder))
    assert refused.value.unknown == ("lm_head.weight",)
    assert_sends_the_checkpoint(state, folder, ignore=("lm_head.weight",))


def test_a_checkpoint_with_both_embeddings_gets_both_from_a_tied_trainer(make_model: Any, tmp_path: Path) -> None:
    model = load(make_model(arch="llama", tied=True))
    both = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= both.keys()
    save_file(both, tmp_path / "model.safetensors")
    for weights in (model, TensorDict.from_module(model), model.state_dict()):
        assert_sends_the_checkpoint(weights, tmp_path)


def test_tables_that_servers_compute_are_neither_required_nor_sent(folder: Path, tmp_path: Path) -> None:
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    state = load(folder).state_dict()
    stored = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**stored, old: torch.ones(8)}, tmp_path / "model.safetensors")
    check_coverage(open_source(state, Checkpoint.read(tmp_path)).specs(), Checkpoint.read(tmp_path))
    assert_sends_the_checkpoint({**state, old: torch.ones(8)}, folder)


def test_names_that_the_model_class_does_not_load_are_listed(model: nn.Module, folder: Path) -> None:
    stored = Checkpoint.read(folder)
    extra = {f"model.layers.2.{name}": ((4,), torch.float32) for name in ("mlp.weight", "eh_proj.weight")}
    checkpoint = Checkpoint.from_specs(
        {**{n: (s.shape, s.dtype) for n, s in stored.specs.items()}, **extra}, tied=stored.tied
    )
    assert open_source(model, checkpoint).omitted_names == ()
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2.*"]
    source = open_source(model, checkpoint)
    assert source.omitted_names == tuple(extra)
    check_coverage(source.specs(), checkpoint, ignore=source.omitted_names)
