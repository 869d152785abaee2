"""autogen-agentchat, unmodified: an assistant with a tool, whole answers and streamed ones."""

import asyncio
import sys

from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient

base_url, api_key = sys.argv[1:]
ABILITIES = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "structured_output": True,
    "family": "unknown",
}


async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def ask(*, stream: bool) -> None:
    client = OpenAIChatCompletionClient(model="policy", base_url=base_url, api_key=api_key, model_info=ABILITIES)
    agent = AssistantAgent(
        "calculator",
        model_client=client,
        tools=[add],
        system_message="Add with the tool.",
        model_client_stream=stream,
        max_tool_iterations=4,
    )
    result = await agent.run(task=f"What is 2 + 3? Streamed: {stream}")
    assert "5" in result.messages[-1].content, result
    await client.close()


for stream in (False, True):
    asyncio.run(ask(stream=stream))
