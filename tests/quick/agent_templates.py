"""A chat template in Qwen3's manner, and a tool call as a model spells it."""

# Qwen3's manner: thinking is a field of the message, or in the content, and is written after the last question only.
QWEN3 = """\
{%- if tools -%}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' -%}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' -%}
{%- set content = m.content or '' -%}{%- set thinking = m.reasoning_content or '' -%}
{%- if not thinking and '</think>' in content -%}
{%- set thinking = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
<|im_start|>assistant
{% if loop.index0 > ns.last and (loop.last or thinking) -%}<think>
{{ thinking.strip('\\n') }}
</think>

{{ content.lstrip('\\n') }}
{%- else -%}{{ content }}{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{%- if (loop.first and content) or not loop.first -%}{{ '\\n' }}{%- endif -%}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}<|im_end|>
{% elif m.role == 'tool' -%}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false -%}<think>

</think>

{% endif -%}{%- endif -%}"""

CALL = '<tool_call>\n{"arguments" : {"b":3 , "a": 2.0}, "name": "add"}\n</tool_call>'
