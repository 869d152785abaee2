"""Checkpoints of which SGLang ignores a setting are refused at launch and on connect; others are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchrl_sglang import ConfigError
from torchrl_sglang.config import ServerConfig
from torchrl_sglang.pool.checks import refuse_different_models
from torchrl_sglang.protocol.messages import ServerInfo
from torchrl_sglang.server.model_check import refuse_unsupported_model

MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": 4096, "max_position_embeddings": 32768}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "sliding_window": 4096,
    "use_sliding_window": True,
    "max_window_layers": 20,
    "num_hidden_layers": 28,
    "max_position_embeddings": 32768,
}
QWEN3_MOE = {"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "mlp_only_layers": []}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "sliding_window": 4096,
    "hidden_act": "gelu_pytorch_tanh",
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "sliding_window": 512,
    "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}},
}
PHI3 = {"architectures": ["Phi3ForCausalLM"], "sliding_window": 2047, "max_position_embeddings": 4096}
OLMO = {"architectures": ["OlmoForCausalLM"], "rope_parameters": {"rope_type": "linear", "factor": 2.0}}

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a sliding window": (MISTRAL, {}, "MistralForCausalLM: sliding_window=4096 is ignored.*context_length=4096"),
    "a longer context": (MISTRAL, {"context_length": 8192}, "sliding_window=4096"),
    "a longer context in extra_args": (MISTRAL, {"extra_args": ("--context-length", "8192")}, "sliding_window=4096"),
    "transformers' code in SGLang, which has no window either": (
        MISTRAL,
        {"extra_args": ("--model-impl", "transformers")},
        "sliding_window=4096",
    ),
    "a window in some layers": (QWEN2, {}, "Qwen2ForCausalLM: sliding_window=4096"),
    "dense layers among experts": (QWEN3_MOE | {"mlp_only_layers": [1]}, {}, r"mlp_only_layers=\[1\] is ignored"),
    "experts in every other layer": (QWEN3_MOE | {"decoder_sparse_step": 2}, {}, "decoder_sparse_step=2 is ignored"),
    "capped attention on a CPU": (GEMMA2, {"device": "cpu"}, "attn_logit_softcapping=50.0.*'torch_native'"),
    "an activation without its old name": (
        {"architectures": ["Gemma2ForCausalLM"]},
        {"device": "cuda"},
        "needs .hidden_act.: .gelu_pytorch_tanh.",
    ),
    "a window just below the context": (PHI3, {}, "Phi3ForCausalLM: sliding_window=2047 .*context_length=2047"),
    "a bias of the output layer": ({"architectures": ["PhiForCausalLM"]}, {}, r"lm_head\.bias\) is left out"),
    "biases of the MLP": (
        {"architectures": ["LlamaForCausalLM"], "mlp_bias": True},
        {},
        "LlamaForCausalLM: mlp_bias=true is ignored",
    ),
    "all biases": (
        {"architectures": ["GraniteForCausalLM"], "mlp_bias": True, "attention_bias": True},
        {},
        "mlp_bias and attention_bias=true is ignored",
    ),
    "a bias named in the config": (
        {"architectures": ["PhimoeForCausalLM"], "lm_head_bias": True},
        {},
        r"lm_head\.bias\) is left out",
    ),
    "rope scaling": (OLMO, {}, "rope scaling of type 'linear' is ignored"),
    "rope scaling by its older name": (
        {"architectures": ["OlmoForCausalLM"], "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {},
        "rope scaling of type 'dynamic' is ignored",
    ),
    "an override that brings the window": (
        MISTRAL | {"sliding_window": None},
        {"extra_args": ('--json-model-override-args={"sliding_window": 64}',)},
        "sliding_window=64",
    ),
}
SERVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a context within the window": (MISTRAL, {"context_length": 4096}),
    "an override that removes the window": (
        MISTRAL,
        {"extra_args": ("--json-model-override-args", '{"sliding_window": null}')},
    ),
    "no window": (MISTRAL | {"sliding_window": None}, {}),
    "a window that is switched off": (QWEN2 | {"use_sliding_window": False}, {}),
    "a window above the last layer": (QWEN2 | {"max_window_layers": 28}, {}),
    "experts in every layer": (QWEN3_MOE, {}),
    "capped attention on a GPU": (GEMMA2, {"device": "cuda"}),
    "a family with windows": (GEMMA3, {"device": "cpu"}),
    "no rope scaling": (OLMO | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {}),
    "rope scaling of Llama": (
        {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {},
    ),
    "biases that Llama has": ({"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": False}, {}),
    "an unknown architecture": ({"architectures": ["NewForCausalLM"], "sliding_window": 8}, {}),
    "no architecture": ({}, {}),
}


def checkpoint(folder: Path, content: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def check_launch(model: str, fields: dict[str, Any]) -> None:
    config = ServerConfig(model=model, **fields)
    refuse_unsupported_model(config, cpu=config.device == "cpu")


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_would_be_computed_in_another_way_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        check_launch(checkpoint(tmp_path, content), fields)
    assert "Nothing was started" in str(caught.value)


@pytest.mark.parametrize("case", SERVED)
def test_other_checkpoints_are_served(tmp_path: Path, case: str) -> None:
    content, fields = SERVED[case]
    check_launch(checkpoint(tmp_path, content), fields)


def test_a_checkpoint_that_is_not_here_is_not_checked() -> None:
    check_launch("someone/some-model", {})


def test_a_running_server_is_checked_on_connect(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, MISTRAL)
    info = ServerInfo(url="http://a:1", version="0.5.23", model_path=model, tokenizer_path=model, context_length=32768)
    with pytest.raises(ConfigError, match="http://a:1 does not compute .* sliding_window=4096"):
        refuse_different_models([info])
    short = ServerInfo(url="http://a:1", version="0.5.23", model_path=model, tokenizer_path=model, context_length=4096)
    refuse_different_models([short])
    capped = checkpoint(tmp_path, GEMMA2)
    for backend, refused in (("torch_native", True), ("triton", False)):
        raw = {"attention_backend": backend}
        info = ServerInfo(url="http://a:1", version="0.5.23", model_path=capped, tokenizer_path=capped, raw=raw)
        if refused:
            with pytest.raises(ConfigError, match="attn_logit_softcapping"):
                refuse_different_models([info])
        else:
            refuse_different_models([info])
