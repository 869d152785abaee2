"""An agent with a calculator, written with the `openai` package alone. It knows nothing of training or of SGLang.

    OPENAI_BASE_URL=... OPENAI_API_KEY=... python calculator_agent.py '{"query": "Write a Python code block that prints
        716 + 796.", "answer": "1512"}'

The model writes arithmetic as Python; the calculator works out what it prints, and the model is asked for the result.
An answer without arithmetic ends the conversation. The last line of the output is the reward.
"""

import ast
import asyncio
import json
import operator
import re
import sys

from openai import AsyncOpenAI

MAX_TURNS = 2
FENCE = "\n```\n"  # ends a code block, so that the model does not go on behind it
CODE = re.compile(r"```(?:python|py)\n(.*?)(?:```|$)", re.DOTALL)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


async def run_agent(task: dict, base_url: str | None = None, api_key: str | None = None) -> dict:
    """Work on one task. Returns its reward, and whether the answer is right."""
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": task["query"]}]
    bonus = 0.0
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=600) as client:
        for turn in range(MAX_TURNS):
            reply = await client.chat.completions.create(model="any", messages=messages, max_tokens=32, stop=FENCE)
            said = reply.choices[0].message
            messages.append(said.model_dump(exclude_none=True))
            printed = calculate(said.content or "") if turn + 1 < MAX_TURNS else None
            if printed is None:
                break
            if turn == 0 and printed == task["answer"]:
                bonus = 0.3  # for a useful calculation, before the model has learned to report it
            question = f"{printed}\nWhat does it print? Answer with only the number."
            messages.append({"role": "user", "content": question})
    numbers = re.findall(r"\d+", said.content or "")
    right = bool(numbers) and numbers[-1] == task["answer"]
    return {"reward": bonus + 0.7 * right, "info": {"right": right, "turns": turn + 1}}


def calculate(text: str) -> str | None:
    """What the arithmetic in a code block prints; `None` if there is none."""
    code = CODE.search(text)
    if code is None:
        return None
    values: dict[str, int] = {}
    try:
        for line in ast.parse(code[1]).body:
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                values[line.targets[0].id] = evaluate(line.value, values)
            elif isinstance(line, ast.Expr) and isinstance(line.value, ast.Call) and line.value.args:
                return str(evaluate(line.value.args[0], values))
    except (SyntaxError, ValueError, KeyError):
        pass
    return "error"


def evaluate(node: ast.expr, values: dict[str, int]) -> int:
    """The value of sums, differences and products of whole numbers."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) < 10**9:
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.left, values), evaluate(node.right, values))
    raise ValueError("the calculator adds, subtracts and multiplies whole numbers")


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run_agent(json.loads(sys.argv[1])))))  # the addresses are in the environment
