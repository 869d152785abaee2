"""pydantic-ai, unmodified: an agent with a tool, and a streamed answer."""

import asyncio
import sys
from typing import Literal

from pydantic_ai import Agent, ModelSettings, RunContext
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

base_url, api_key = sys.argv[1:]
model = OpenAIChatModel("policy", provider=OpenAIProvider(base_url=base_url, api_key=api_key))
added = []


def settings(context: RunContext) -> ModelSettings:
    """Make the first request call the tool."""
    return ModelSettings(max_tokens=64, extra_body={"tool_choice": "required"} if context.run_step <= 1 else None)


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
