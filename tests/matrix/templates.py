"""Chat templates in the manner of model families. All were written for these tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TEMPLATES", "Template"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A chat template and what it accepts.

    Attributes:
        source: the Jinja template.
        end: the token that ends the assistant's turn; ``None`` is the tokenizer's EOS.
        has_system: whether a conversation may begin with a system message.
        has_tools: whether it takes tools, tool calls and their results.
        rewrites: whether it renders an earlier answer in another way than the last one.
        variables: a variable that users set, with a value that changes the prompt.
    """

    source: str
    end: str | None
    has_system: bool = True
    has_tools: bool = False
    rewrites: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


_CHATML = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

_CHATML_MARKED = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' -%}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}{{ m.content + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# Qwen3's manner: tools in the system message, calls in tags, thinking only after the last question.
_THINKING = """\
{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' -%}{{ messages[0].content + '\\n\\n' }}{%- endif -%}
{{ 'You may call:' }}
{%- for tool in tools -%}{{ '\\n' + (tool | tojson) }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' -%}
{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' -%}
{%- set text = m.content or '' -%}
{%- if loop.index0 < ns.last and '</think>' in text -%}
{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\\n' + text }}
{%- for call in m.tool_calls or [] -%}
{%- set f = call.function or call -%}
{{ '\\n<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}
{{ f.arguments if f.arguments is string else f.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' -%}
{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}
"""

# Llama 3's manner: BOS, roles between header tokens, a date, text trimmed, always a system turn.
_HEADERS = """\
{{- bos_token or '' -}}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set rest = messages -%}{%- endif -%}
{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today: ' + (date_string or '26 Jul 2024') + '\\n\\n' + system + '<|eot_id|>' -}}
{%- for m in rest -%}
{%- if m.role == 'tool' -%}
{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}
{%- elif m.tool_calls -%}
{%- if m.tool_calls | length != 1 -%}{{ raise_exception('one tool call at a time') }}{%- endif -%}
{%- set f = m.tool_calls[0].function -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + f.name + '", "parameters": ' }}
{{- f.arguments if f.arguments is string else f.arguments | tojson }}{{ '}<|eot_id|>' }}
{%- else -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""

# Mistral's manner: roles alternate, the system prompt goes into the first question, calls need ids of nine characters.
_ALTERNATING = """\
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content + '\\n\\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- set ns = namespace(turn=0) -%}
{%- for m in rest if m.role in ('user', 'assistant') and not m.tool_calls -%}
{%- if (m.role == 'user') != (ns.turn % 2 == 0) -%}
{{ raise_exception('roles must alternate user/assistant/user/assistant') }}
{%- endif -%}
{%- set ns.turn = ns.turn + 1 -%}
{%- endfor -%}
{{- bos_token or '' -}}
{%- for m in rest -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.last -%}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif -%}
{{ '[INST] ' + (system if loop.first else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls -%}
{{ '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls -%}
{%- if not call.id or call.id | length != 9 -%}
{{ raise_exception('a tool call needs an id of 9 characters') }}
{%- endif -%}
{%- set f = call.function -%}
{{ '{"name": "' + f.name + '", "arguments": ' }}
{{- f.arguments if f.arguments is string else f.arguments | tojson }}
{{- ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') -}}
{%- endfor -%}
{{- eos_token -}}
{%- elif m.role == 'assistant' -%}
{{ ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' -%}
{%- if not m.tool_call_id or m.tool_call_id | length != 9 -%}
{{ raise_exception('a tool result needs the id of its call') }}
{%- endif -%}
{{ '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}' }}
{%- else -%}{{ raise_exception('unknown role ' + m.role) }}
{%- endif -%}
{%- endfor -%}
"""

# Gemma's manner: BOS, the assistant is called model, no system turn, text trimmed.
_MODEL_ROLE = """\
{{- bos_token or '' -}}
{%- if messages[0].role == 'system' -%}
{%- set first = messages[0].content | trim + '\\n\\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}
{{- m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

# Without special tokens: roles are words, an answer ends with EOS, a system message is refused.
_WORDS = """\
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{{ m.role | capitalize + ': ' + m.content }}{{ eos_token if m.role == 'assistant' else '' }}{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""

TEMPLATES: dict[str, Template] = {
    "ChatML": Template(source=_CHATML, end="<|im_end|>"),
    "ChatML with generation tags": Template(source=_CHATML_MARKED, end="<|im_end|>"),
    "thinking": Template(
        source=_THINKING, end="<|im_end|>", has_tools=True, rewrites=True, variables={"enable_thinking": False}
    ),
    "headers": Template(source=_HEADERS, end="<|eot_id|>", has_tools=True, variables={"date_string": "1 Jan 2026"}),
    "alternating": Template(source=_ALTERNATING, end=None, has_tools=True),
    "model role": Template(source=_MODEL_ROLE, end="<end_of_turn>"),
    "words": Template(source=_WORDS, end=None, has_system=False),
}
