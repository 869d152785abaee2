"""What a request of Anthropic's API says of thinking, as variables of the chat template."""

from __future__ import annotations

import re
from typing import Any

from torchrl_sglang.agents.http.api_errors import bad_request
from torchrl_sglang.agents.http.fields import Fields

__all__ = ["thinking_variables"]

_SWITCHES = (
    ("enable_thinking", re.compile(r"\benable_thinking\b")),  # Qwen3, GLM, Hunyuan
    ("thinking", re.compile(r"\bthinking is (not )?defined\b")),  # DeepSeek V3.1, Kimi K2
)
_THINKS = re.compile(r"think|reasoning", re.IGNORECASE)
_EFFORTS = ("low", "medium", "high", "xhigh", "max")


def thinking_variables(fields: Fields, template: str) -> dict[str, Any]:
    """The variables that ``thinking`` and ``output_config.effort`` set.

    ``adaptive`` leaves it to the model, as the template has it. The budget is a hint to the model, which no template
    takes; effort has no effect where the template has no ``reasoning_effort``: Anthropic's clients send it unasked.

    Args:
        fields: of the request.
        template: the text of the model's chat template.

    Raises:
        ApiError: thinking is asked for, and the template has none.

    Examples:
        >>> thinking_variables(Fields({"thinking": {"type": "disabled"}}), "{% if enable_thinking %}")
        {'enable_thinking': False}
        >>> thinking_variables(Fields({"thinking": {"type": "adaptive"}}), "{% if enable_thinking %}")
        {}
    """
    variables = _switch(fields, template)
    config = Fields(fields.object("output_config") or {}, "output_config")
    effort = config.text("effort", choices=_EFFORTS)
    config.any("format")  # a grammar, read elsewhere
    config.refuse_unread()
    if effort is not None and "reasoning_effort" in template:
        variables["reasoning_effort"] = effort
    return variables


def _switch(fields: Fields, template: str) -> dict[str, Any]:
    given = fields.object("thinking")
    if given is None:
        return {}
    thinking = Fields(given, "thinking")
    kind = thinking.text("type", choices=("enabled", "disabled", "adaptive"), required=True)
    thinking.integer("budget_tokens", at_least=0)
    thinking.text("display")
    thinking.refuse_unread()
    if kind == "adaptive":
        return {}
    if kind == "enabled" and not _THINKS.search(template):
        raise bad_request(
            "thinking can't be switched on by a request: this model's chat template has no thinking. Leave it out, or "
            "send {'type': 'adaptive'}",
            "thinking",
            "unsupported_parameter",
        )
    for name, pattern in _SWITCHES:
        if pattern.search(template):
            return {name: kind == "enabled"}
    return {}
