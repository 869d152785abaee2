"""A checkpoint's folder is sent like a model; weights of another architecture are refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.fake_sglang import FakeServer, FakeSettings
from tests.fake_sglang.model import read_checkpoint
from torchrl_sglang import AsyncSGLang, ConfigError, SGLangWeightSyncScheme, SyncConfig, WeightCoverageError
from torchrl_sglang.config import SamplingParams
from torchrl_sglang.weights.checkpoint.tensor_files import read_tensors


@pytest.fixture
def servers(fake: FakeServer) -> Any:
    with AsyncSGLang.connect(fake.url) as engine:
        scheme = SGLangWeightSyncScheme(engine, config=SyncConfig(verify="off"))  # the fake's answers are no Llama's
        yield engine
        scheme.shutdown()


def scores(servers: AsyncSGLang) -> list[float]:
    (reply,) = servers.pool.generate([[5, 6, 7, 8]], SamplingParams(max_new_tokens=0), prompt_logprobs=True)
    assert reply.prompt_logprobs is not None
    return [value for value in reply.prompt_logprobs if value is not None]


def expected(folder: Path) -> list[float]:
    """What a server answers that was started from the folder."""
    with FakeServer(FakeSettings(model_path=folder)) as fake, AsyncSGLang.connect(fake.url) as servers:
        return scores(servers)


def sharded(folder: Path, target: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(target, max_shard_size="100KB")
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


@pytest.mark.parametrize("kind", ["str", "Path", "sharded", "file"])
def test_a_folder_is_sent_like_the_model_in_it(
    servers: AsyncSGLang, tiny_llama_b: Path, tmp_path: Path, kind: str
) -> None:
    weights: Any = {
        "str": lambda: f"{tiny_llama_b}/",
        "Path": lambda: tiny_llama_b,
        "sharded": lambda: sharded(tiny_llama_b, tmp_path / "sharded"),
        "file": lambda: str(tiny_llama_b / "model.safetensors"),
    }[kind]()
    before = scores(servers)
    report = servers.update_weights(weights)
    assert report is not None
    assert report.version == 1
    assert scores(servers) == expected(tiny_llama_b) != before


def test_a_folder_is_read_again_when_servers_are_healed(servers: AsyncSGLang, tiny_llama_b: Path) -> None:
    servers.update_weights(tiny_llama_b)
    report = servers.weights.sync.heal()
    assert report is not None
    assert report.version == 2


def test_a_scheme_sends_a_folder_when_it_connects(fake: FakeServer, tiny_llama_b: Path) -> None:
    scheme = SGLangWeightSyncScheme(fake.url, model=str(tiny_llama_b), config=SyncConfig(verify="off"))
    scheme.connect()
    assert scheme.pool.weight_version == 1
    scheme.shutdown()


def test_the_tensors_of_a_folder_are_those_of_its_files(tiny_llama: Path) -> None:
    read = read_tensors(tiny_llama)
    stored = load_file(tiny_llama / "model.safetensors")
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], stored[name]) for name in stored)


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nothing", "neither a folder on this machine.*give a folder with safetensors files"),
        (lambda path: "no/such-model", "neither a folder on this machine nor in the local Hugging Face cache"),
        (lambda path: folder_with(path / "a", "config.json"), "holds no weight files"),
        (
            lambda path: folder_with(path / "b", "config.json", "pytorch_model.bin"),
            "holds only pytorch_model.bin.*save_pretrained",
        ),
        (
            lambda path: folder_with(path / "c", "adapter_config.json"),
            "holds a LoRA adapter.*PeftModel",
        ),
        (lambda path: folder_with(path / "d", "model.safetensors"), "is not a safetensors file"),
        (lambda path: folder_with(path / "e", "trainer.pt") / "trainer.pt", "is not a safetensors file"),
    ],
)
def test_a_folder_that_can_not_be_sent_is_refused(
    servers: AsyncSGLang, tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        servers.update_weights(make(tmp_path))
    assert servers.weight_version == 0


# ------------------------------------------------------------------------------------------------- another architecture


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=320, n_positions=64))


NAMED = "^the trainer's model is a GPT2LMHeadModel; the servers hold LlamaForCausalLM"


def test_a_model_of_another_architecture_is_named_first(servers: AsyncSGLang) -> None:
    with pytest.raises(WeightCoverageError, match=NAMED) as caught:
        servers.update_weights(gpt2())
    assert "In detail: the trainer's tensors don't match" in str(caught.value)
    assert caught.value.missing
    assert caught.value.unknown
    assert servers.weight_version == 0


@pytest.mark.parametrize("wrap", [torch.nn.Sequential, torch.compile])
def test_a_wrapper_does_not_hide_the_architecture(servers: AsyncSGLang, wrap: Any) -> None:
    with pytest.raises(WeightCoverageError, match=NAMED):
        servers.update_weights(wrap(gpt2()))


def test_the_folder_of_another_architecture_is_named_first(servers: AsyncSGLang, tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(WeightCoverageError, match=NAMED):
        servers.update_weights(tmp_path)


def test_a_model_without_its_head_is_named(servers: AsyncSGLang, make_model: Any) -> None:
    without_head = AutoModel.from_pretrained(make_model(arch="llama", seed=0), dtype=torch.float32)
    torch.nn.init.zeros_(without_head.layers[0].mlp.up_proj.weight)
    weights = torch.nn.ModuleDict({"model": without_head, "value": torch.nn.Linear(2, 2)})
    with pytest.raises(WeightCoverageError, match="the trainer's model is a LlamaModel; the servers hold LlamaFor"):
        servers.update_weights(weights)


def test_the_architecture_comes_before_a_complaint_about_ties(tmp_path: Path, make_model: Any) -> None:
    with_ties = make_model(arch="llama", seed=3, tied=True)
    qwen = AutoModelForCausalLM.from_pretrained(make_model(arch="qwen2", seed=1), dtype=torch.float32)
    with FakeServer(FakeSettings(model_path=with_ties)) as fake, pytest.raises(WeightCoverageError) as caught:
        AsyncSGLang.connect(fake.url).update_weights(qwen)
    assert str(caught.value).startswith("the trainer's model is a Qwen2ForCausalLM; the servers hold LlamaForCausalLM")


def test_one_architecture_is_not_named(servers: AsyncSGLang, make_model: Any) -> None:
    larger = AutoModelForCausalLM.from_pretrained(make_model(arch="llama", seed=0, layers=3), dtype=torch.float32)
    with pytest.raises(WeightCoverageError, match="^the trainer's tensors don't match the served checkpoint"):
        servers.update_weights(larger)


def test_tensors_without_a_model_are_refused_as_before(servers: AsyncSGLang, tiny_llama: Path) -> None:
    tensors = read_checkpoint(tiny_llama)
    tensors.pop("lm_head.weight", None)
    tensors.pop("model.norm.weight")
    with pytest.raises(WeightCoverageError, match="^the trainer's tensors don't match"):
        servers.update_weights(tensors)


def test_an_architecture_that_transformers_does_not_know_is_named(
    servers: AsyncSGLang, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OtherForCausalLM"]}))
    save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightCoverageError, match="^the trainer's model is a OtherForCausalLM"):
        servers.update_weights(tmp_path)
