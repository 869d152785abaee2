"""Which of SGLang's tool-call parsers a model needs, told by its chat template, its architecture or its name.

Source: the formats in the model cards' chat templates, and the names that ``--tool-call-parser`` takes (SGLang 0.5.23).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["NEVER_ASKED", "READ_HERE_TOO", "parser_for", "template_text"]

NEVER_ASKED = frozenset({"pythonic"})
"""Parsers that the server must not be asked for: 300 characters of some texts keep its HTTP process busy for hours."""

READ_HERE_TOO = frozenset(
    {"pythonic", "qwen", "qwen25", "hermes", "llama3", "mistral", "qwen3_coder", "step3p5", "nanbeige"}
)
"""Parsers whose formats :func:`~torchrl_sglang.chat.tool_calls.read_tool_calls` reads as well."""

# All marks of a line are in the template. The first line that fits decides: later ones have marks that others share.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("iquest_q1", ("<|iquest_assistant|>",)),
    ("gigachat35", ("<｜GCML｜tool_calls>",)),
    ("k2_horizon", ("<ifm|tool_call>",)),
    ("apertus2509", ("<|tools_prefix|>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("beam", ("<rfl:parameter",)),
    ("gpt-oss", ("<|channel|>", "<|message|>")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minimax-m3", ("]<]minimax[>[",)),
    ("minimax-m2", ("<minimax:tool_call>",)),
    ("interns1", ("<|action_start|>", "<|plugin|>")),
    ("deepseekv41", ("<｜DSML｜ calls>",)),
    ("deepseekv4", ("<｜DSML｜tool_calls>",)),
    ("deepseekv32", ("<｜DSML｜function_calls>",)),
    ("deepseekv3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseekv31", ("<｜tool▁calls▁begin｜>",)),
    ("step3", ("<steptml:invoke",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("hunyuan", ("<tool_calls>", "<tool_sep>")),
    ("ling3", ("<|role_end|>", "<arg_key>", "<arg_value>")),
    ("glm45", ("<arg_key>", "<arg_value>", "\\n<arg_key>")),
    ("glm45", ("<arg_key>", "<arg_value>", "\n<arg_key>")),
    ("glm47", ("<arg_key>", "<arg_value>")),
    ("minicpm5", ("<function name=", "<param name=")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("llama3", ("<|python_tag|>",)),
    ("llama3", ("<|start_header_id|>", '"parameters"')),
    ("pythonic", ("<|header_start|>", "func_name1(")),
    ("qwen25", ("<tool_call>", "<|im_start|>")),
    ("hermes", ("<tool_call>", '"arguments"')),
)
_ARCHITECTURES = {
    "qwen2": "qwen25",
    "qwen2_moe": "qwen25",
    "qwen3": "qwen25",
    "qwen3_moe": "qwen25",
    "qwen3_next": "qwen25",
    "qwen3_5": "qwen3_coder",
    "qwen3_5_moe": "qwen3_coder",
    "mistral": "mistral",
    "mistral3": "mistral",
    "mixtral": "mistral",
    "llama4": "pythonic",
    "deepseek_v3": "deepseekv3",
    "deepseek_v32": "deepseekv32",
    "deepseek_v4": "deepseekv4",
    "kimi_k2": "kimi_k2",
    "glm4_moe": "glm45",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
    "gemma4": "gemma4",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2",
    "apertus": "apertus2509",
}
# Of the name's last part, in lower case.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"hermes", "hermes"),
    (r"qwen3-coder|qwen3[._]5", "qwen3_coder"),
    (r"qwen|qwq", "qwen25"),
    (r"llama-?3", "llama3"),
    (r"llama-?4", "pythonic"),
    (r"mistral|mixtral|ministral|magistral|devstral", "mistral"),
    (r"kimi-k2", "kimi_k2"),
    (r"glm-4\.7", "glm47"),
    (r"glm-4\.[56]", "glm45"),
    (r"deepseek-v3\.2", "deepseekv32"),
    (r"deepseek-v3\.1", "deepseekv31"),
    (r"deepseek-(v3|r1)", "deepseekv3"),
    (r"gpt-oss", "gpt-oss"),
    (r"minimax-m2", "minimax-m2"),
)


def template_text(renderer: Any) -> str:
    """The text of a tokenizer's or processor's chat template, all of them if it has several."""
    template = getattr(renderer, "chat_template", None) or ""
    return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template)


def parser_for(
    *, template: str = "", config: Mapping[str, Any] | None = None, model: str = "", server_flag: str | None = None
) -> str | None:
    """SGLang's name of the parser that reads a model's tool calls; ``None`` if the model's family is not known.

    Args:
        template: the text of the chat template.
        config: the checkpoint's ``config.json``.
        model: path or name of the model.
        server_flag: the server's ``--tool-call-parser``.

    Examples:
        >>> parser_for(template="{{ '<｜tool▁calls▁begin｜>' }}{{ '```json' }}")
        'deepseekv3'
        >>> parser_for(model="meta-llama/Llama-3.1-8B-Instruct"), parser_for(model="gpt2")
        ('llama3', None)
    """
    if server_flag and server_flag != "auto":
        return server_flag
    for parser, marks in _MARKS:
        if all(mark in template for mark in marks):
            return parser
    config = config or {}
    text_config = config.get("text_config")
    types = [config.get("model_type"), text_config.get("model_type") if isinstance(text_config, Mapping) else None]
    known = next((_ARCHITECTURES[kind] for kind in types if kind in _ARCHITECTURES), None)
    if known is not None:
        return known
    name = model.rstrip("/").rpartition("/")[2].lower()
    return next((parser for pattern, parser in _NAMES if re.search(pattern, name)), None)
