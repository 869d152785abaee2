"""langchain-openai, unmodified: a tool that is called, its result, and a streamed answer."""

import sys
from typing import Literal

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

base_url, api_key = sys.argv[1:]
STOP = ["h", "i", "f", "p", "y", "w", "k"]  # none is in a call; a random model would hardly end its answer


@tool
def add(a: Literal[2], b: Literal[3]) -> int:
    """Add two numbers."""
    return a + b


model = ChatOpenAI(model="policy", base_url=base_url, api_key=api_key, max_tokens=512, stop_sequences=STOP)
messages = [SystemMessage("Add with the tool, then say the sum."), HumanMessage("What is 2 + 3?")]
call = model.bind_tools([add], tool_choice="add").invoke(messages)
assert [each["args"] for each in call.tool_calls] == [{"a": 2, "b": 3}], call
messages += [call, add.invoke(call.tool_calls[0])]
assert messages[-1].content == "5"
answer = ""
for piece in model.bind_tools([add], tool_choice="none").stream(messages):
    answer += piece.text if isinstance(piece.text, str) else piece.text()
print(repr(answer))
