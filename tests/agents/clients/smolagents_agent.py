"""smolagents, unmodified: a ToolCallingAgent that must call its tool in each of two steps, and then say the answer."""

import sys

from smolagents import OpenAIServerModel, Tool, ToolCallingAgent

base_url, api_key = sys.argv[1:]
STOP = ["h", "i", "f", "p", "y", "w", "k"]  # none is in a call; a random model would hardly end its answer
added = []


class Add(Tool):
    name = "add"
    description = "Adds two numbers."
    inputs = {
        "a": {"type": "integer", "description": "the first", "enum": [2]},
        "b": {"type": "integer", "description": "the second", "enum": [3]},
    }
    output_type = "integer"

    def forward(self, a: int, b: int) -> int:
        added.append((a, b))
        return a + b


model = OpenAIServerModel(
    "policy",
    api_base=base_url,
    api_key=api_key,
    max_tokens=512,
    stop=STOP,
    parallel_tool_calls=False,
    tool_choice={"type": "function", "function": {"name": "add"}},
)


def release(step, agent) -> None:
    """After the last step the agent asks for an answer without tools."""
    if len(added) == 2:
        model.kwargs.pop("tool_choice", None)


agent = ToolCallingAgent(tools=[Add()], model=model, max_steps=2, verbosity_level=0, step_callbacks=[release])
answer = agent.run("What is 2 + 3?")
assert added == [(2, 3), (2, 3)], added
print(repr(answer))
