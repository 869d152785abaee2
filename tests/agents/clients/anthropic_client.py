"""Anthropic's package, unmodified: a tool that is called, its result, and a streamed answer."""

import sys

from anthropic import Anthropic

base_url, api_key = sys.argv[1:]
STOP = ["h", "i", "f", "p", "y", "w", "k"]  # none is in a call; a random model would hardly end its answer
client = Anthropic(base_url=base_url, api_key=api_key)
ARGUMENTS = {"type": "object", "properties": {"a": {"enum": [2]}, "b": {"enum": [3]}}, "required": ["a", "b"]}
common = {
    "model": "policy",
    "max_tokens": 512,
    "stop_sequences": STOP,
    "system": "Add with the tool, then say the sum.",
    "tools": [{"name": "add", "description": "Adds.", "input_schema": ARGUMENTS}],
}
messages = [{"role": "user", "content": "What is 2 + 3?"}]
choice = {"type": "tool", "name": "add", "disable_parallel_tool_use": True}
reply = client.messages.create(messages=messages, tool_choice=choice, **common)
assert reply.stop_reason == "tool_use", reply
[call] = [block for block in reply.content if block.type == "tool_use"]
assert call.input == {"a": 2, "b": 3}, call
result = {"type": "tool_result", "tool_use_id": call.id, "content": str(call.input["a"] + call.input["b"])}
messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
with client.messages.stream(messages=messages, tool_choice={"type": "none"}, **common) as stream:
    answer = "".join(stream.text_stream)
    assert answer == "".join(block.text for block in stream.get_final_message().content)
print(repr(answer))
