"""pydantic-ai, unmodified: an agent with a tool, and a streamed answer."""

import asyncio
import sys
from typing import Literal

from pydantic_ai import Agent, ModelSettings, RunContext
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

base_url, api_key = sys.argv[1:]
STOP = ["h", "i", "f", "p", "y", "w", "k"]  # none is in a call; a random model would hardly end its answer
model = OpenAIChatModel("policy", provider=OpenAIProvider(base_url=base_url, api_key=api_key))
added = []


def settings(context: RunContext) -> ModelSettings:
    """Make the first request call the tool."""
    forced = {"tool_choice": "required"} if context.run_step <= 1 else None
    return ModelSettings(max_tokens=512, stop_sequences=STOP, extra_body=forced)


agent = Agent(model, instructions="Add with the tool, then say the sum.", model_settings=settings)


@agent.tool_plain
def add(a: Literal[2], b: Literal[3]) -> int:
    """Add two numbers."""
    added.append((a, b))
    return a + b


async def main() -> None:
    result = await agent.run("What is 2 + 3?")
    assert added == [(2, 3)], added
    print(repr(result.output))
    async with agent.run_stream(
        "And again?", message_history=result.all_messages(), model_settings={"extra_body": {"tool_choice": "none"}}
    ) as stream:
        print(repr(await stream.get_output()))


asyncio.run(main())
