"""Tiny models: real checkpoints that depend on their arguments only, with a chat template that TorchRL can use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torchrl.data.llm import History

from torchrl_sglang.cached_folder import cached_folder
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.testing import TinyArch, make_tiny_model
from torchrl_sglang.testing.models import VOCAB_SIZE

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "2 + 3 = 5"},
    {"role": "user", "content": "Größer?\n\nYes."},
    {"role": "assistant", "content": "No"},
]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("arch", get_args(TinyArch))
def test_every_architecture_loads_and_runs(arch: TinyArch, make_model: Callable[..., Path]):
    path = make_model(arch=arch)
    auto = (
        transformers.AutoModelForSequenceClassification
        if arch == "llama_classifier"
        else transformers.AutoModelForCausalLM
    )
    model = auto.from_pretrained(path, dtype=torch.float32)
    logits = model(torch.arange(12)[None]).logits
    assert logits.shape == ((1, 1) if arch == "llama_classifier" else (1, 12, VOCAB_SIZE))
    assert logits.isfinite().all()


def test_a_mixture_of_experts_names_each_expert_in_its_checkpoint(make_model: Callable[..., Path]):
    names = weights(make_model(arch="qwen3_moe"))
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in names
    assert "model.layers.0.mlp.gate.weight" in names


def test_tied_embeddings_are_stored_once(make_model: Callable[..., Path]):
    assert "lm_head.weight" in weights(make_model(tied=False))
    assert "lm_head.weight" not in weights(make_model(tied=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weights_have_the_requested_dtype(dtype: str, make_model: Callable[..., Path]):
    path = make_model(dtype=dtype)
    assert {tensor.dtype for tensor in weights(path).values()} == {getattr(torch, dtype)}
    assert json.loads((path / "config.json").read_text())["dtype"] == dtype


def test_only_the_seed_decides_the_weights_and_the_callers_generator_is_unchanged(tmp_path: Path):
    torch.manual_seed(1)
    first = weights(make_tiny_model(tmp_path / "a", seed=3))
    drawn = torch.rand(4)
    again = weights(make_tiny_model(tmp_path / "b", seed=3))
    other = weights(make_tiny_model(tmp_path / "c", seed=4))
    torch.manual_seed(1)
    assert torch.equal(torch.rand(4), drawn)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first.keys() == other.keys()
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)


def test_greedy_output_is_varied_enough_to_tell_models_apart(tiny_llama: Path, tiny_llama_b: Path):
    outputs = []
    for path in (tiny_llama, tiny_llama_b):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        ids = model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=32, do_sample=False)[0, 4:].tolist()
        assert len(set(ids)) > 8, ids
        outputs.append(ids)
    assert outputs[0] != outputs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "lama"}, "unknown arch 'lama'. Did you mean 'llama'?"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"hidden": 65}, "hidden a multiple of heads"),
        ({"heads": 4, "kv_heads": 3}, "heads a multiple of kv_heads"),
        ({"layers": 0}, "sizes must be positive"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        make_tiny_model(tmp_path / "model", **arguments)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- tokenizer


@given(st.text())
@settings(deadline=None)
def test_decoding_the_tokens_of_a_text_returns_the_text(tokenizer, text: str):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < VOCAB_SIZE for token in ids)


def test_special_tokens_are_one_token_each(tokenizer):
    assert tokenizer("<|endoftext|><|im_start|><|im_end|>")["input_ids"] == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == VOCAB_SIZE


def test_a_text_has_more_than_one_tokenization(tokenizer):
    # Decoding and encoding again may give other tokens, as with real tokenizers.
    merged = tokenizer("the")["input_ids"]
    letters = [token for letter in "the" for token in tokenizer(letter)["input_ids"]]
    assert merged != letters
    assert tokenizer.decode(merged) == tokenizer.decode(letters)


def test_torchrl_masks_exactly_the_assistants_messages(tokenizer):
    history = History.from_chats([CHAT])
    answer = history.apply_chat_template(
        tokenizer=tokenizer, add_generation_prompt=False, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, mask = answer["input_ids"][0], answer["assistant_masks"][0].bool()
    assert tokenizer.decode(ids[mask]) == "2 + 3 = 5No"
    assert 0 < mask.sum() < len(mask)


def test_torchrl_parses_a_conversation_from_its_text(tokenizer):
    history = History.from_chats([CHAT])
    [text] = history.apply_chat_template(tokenizer=tokenizer, add_generation_prompt=False)
    back = History.from_text(text, tokenizer=tokenizer)
    assert [list(back.role), list(back.content)] == [[m["role"] for m in CHAT], [m["content"] for m in CHAT]]
    assert all(back.is_complete)


def test_the_template_renders_like_torchrls_chatml(tokenizer):
    history = History.from_chats([CHAT[:-1]])
    ours = history.apply_chat_template(tokenizer=tokenizer, add_generation_prompt=True)
    theirs = history.apply_chat_template(
        tokenizer=tokenizer, add_generation_prompt=True, chat_template_name="chatml_format"
    )
    assert ours == theirs
    assert ours[0].endswith("<|im_start|>assistant\n")


# -------------------------------------------------------------------------------------------------------------- cache


def test_the_same_model_is_not_made_twice_and_another_replaces_it(tmp_path: Path):
    path = make_tiny_model(tmp_path / "model", seed=1)
    made_at = (path / "model.safetensors").stat().st_mtime_ns
    make_tiny_model(path, seed=1)
    assert (path / "model.safetensors").stat().st_mtime_ns == made_at
    first = weights(path)["lm_head.weight"]
    make_tiny_model(path, seed=2)
    assert not torch.equal(weights(path)["lm_head.weight"], first)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not overwritten"):
        make_tiny_model(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_at_the_path_is_refused_and_unchanged(tmp_path: Path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        make_tiny_model(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_an_interrupted_build_leaves_no_folder(tmp_path: Path):
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(tmp_path / "model", {"version": 1}, build)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_that_build_the_same_folder_both_get_it(tmp_path: Path):
    def build(folder: Path) -> None:
        if not (tmp_path / "model").exists():  # the other one, faster
            cached_folder(tmp_path / "model", {"version": 1}, lambda other: (other / "a").write_text("other's"))
        (folder / "a").write_text("ours")

    path = cached_folder(tmp_path / "model", {"version": 1}, build)
    assert (path / "a").read_text() == "other's", "files that somebody may be reading were replaced"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
