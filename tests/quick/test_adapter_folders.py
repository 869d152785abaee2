"""Adapters that a server is started with are read before the start; SGLang would end, or answer wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.server.saved_adapters import check_saved_adapters

peft = pytest.importorskip("peft")


@pytest.fixture
def save(tiny_llama: Path, tmp_path: Path) -> Any:
    def write(**config: Any) -> Path:
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
        peft.get_peft_model(base, peft.LoraConfig(**config)).save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"target_modules": ["v_proj"]}, "q_proj and v_proj together"),
        ({"target_modules": ["q_proj", "k_proj"]}, "q_proj and v_proj together"),
        ({"target_modules": ["up_proj"]}, "without gate_proj"),
        ({"target_modules": ["o_proj"], "use_rslora": True}, "use_rslora"),
        ({"target_modules": ["o_proj"], "alpha_pattern": {"o_proj": 3}}, "alpha_pattern"),
        ({"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["o_proj"], "use_dora": True}, "use_dora"),
        ({"target_modules": ["o_proj"], "bias": "all"}, "bias"),
    ],
)
def test_a_saved_adapter_that_sglang_cannot_serve_is_refused_by_name(
    save: Any, config: dict[str, Any], reason: str
) -> None:
    folder = save(**config)
    for words in (["--lora-paths", f"kind={folder}"], ["--lora-paths", "--enable-lora"], [f"--lora-paths={folder}"]):
        if str(folder) in "".join(words):
            with pytest.raises(ConfigError, match=reason):
                check_saved_adapters(words)
        else:
            check_saved_adapters(words)
    with pytest.raises(ConfigError, match=reason):
        check_saved_adapters(["--lora-paths", f'{{"lora_name": "x", "lora_path": "{folder}"}}', "--max-lora-rank", "8"])


def test_one_that_it_can_serve_is_accepted(save: Any) -> None:
    folder = save(target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
    check_saved_adapters(["--enable-lora", "--lora-paths", str(folder), "hub/adapter", "--max-lora-rank", "8"])
    (folder / "adapter_model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        check_saved_adapters(["--lora-paths", str(folder)])
