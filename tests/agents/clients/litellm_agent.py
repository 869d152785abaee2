"""litellm, unmodified: a tool that is called, its result, and a streamed answer."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches a price list
import litellm

base_url, api_key = sys.argv[1:]
STOP = ["h", "i", "f", "p", "y", "w", "k"]  # none is in a call; a random model would hardly end its answer
ARGUMENTS = {"type": "object", "properties": {"a": {"enum": [2]}, "b": {"enum": [3]}}, "required": ["a", "b"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": ARGUMENTS}}]
common = {"model": "openai/policy", "api_base": base_url, "api_key": api_key, "max_tokens": 512, "stop": STOP}
common["tools"] = TOOLS
messages = [{"role": "user", "content": "What is 2 + 3?"}]
reply = litellm.completion(messages=messages, tool_choice="required", **common).choices[0].message
[call] = reply.tool_calls
arguments = json.loads(call.function.arguments)
assert arguments == {"a": 2, "b": 3}, arguments
messages += [reply, {"role": "tool", "tool_call_id": call.id, "content": str(arguments["a"] + arguments["b"])}]
answer = ""
for chunk in litellm.completion(messages=messages, tool_choice="none", stream=True, **common):
    answer += chunk.choices[0].delta.content or ""
print(repr(answer))
