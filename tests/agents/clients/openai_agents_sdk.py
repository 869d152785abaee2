"""openai-agents, unmodified: an agent with a tool, over the Responses API and over chat completions."""

import sys
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

base_url, api_key = sys.argv[1:]
STOP = ["h", "i", "f", "p", "y", "w", "k"]  # none is in a call; a random model would hardly end its answer
set_tracing_disabled(True)  # else it reports to OpenAI


@function_tool
def add(a: Literal[2], b: Literal[3]) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
    agent = Agent(
        name="Calculator",
        instructions="Add with the tool, then say the sum.",
        tools=[add],
        model=kind(model="policy", openai_client=AsyncOpenAI(base_url=base_url, api_key=api_key)),
        # The choice is reset to "auto" after the first call.
        model_settings=ModelSettings(
            tool_choice="required", parallel_tool_calls=False, max_tokens=512, extra_body={"stop": STOP}
        ),
    )
    result = Runner.run_sync(agent, "What is 2 + 3?", max_turns=3)
    kinds = [item.type for item in result.new_items]
    assert kinds[:2] == ["tool_call_item", "tool_call_output_item"], kinds
    assert [item.output for item in result.new_items if item.type == "tool_call_output_item"] == [5]
    print(repr(result.final_output))
