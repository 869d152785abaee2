"""verifiers, unmodified: environments of one turn, of several turns, and with a tool, scored by their rubrics."""

import asyncio
import os
import sys

import verifiers as vf
from datasets import Dataset

base_url, os.environ["GATEWAY_KEY"] = sys.argv[1:]
DATA = Dataset.from_dict({"question": ["What is 2 + 3?"], "answer": ["5"]})
SAMPLING = {
    "temperature": 1.0,
    "max_tokens": 200,
    "logprobs": True,
    "extra_body": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True},
}


def right(completion, answer) -> float:
    return float(answer in str(completion[-1]))


async def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


class Doubts(vf.MultiTurnEnv):
    """Asks once more."""

    async def env_response(self, messages, state, **_):
        return [{"role": "user", "content": "Are you sure?"}]

    @vf.stop
    async def has_two_turns(self, state, **_) -> bool:
        return len(state["trajectory"]) >= 2


rubric = vf.Rubric(funcs=[right])
client = vf.ClientConfig(client_type="openai_chat_completions", api_base_url=base_url, api_key_var="GATEWAY_KEY")
for env in (
    vf.SingleTurnEnv(dataset=DATA, rubric=rubric, system_prompt="Be brief."),
    Doubts(dataset=DATA, rubric=rubric, max_turns=3),
    vf.ToolEnv(tools=[add], dataset=DATA, rubric=rubric, max_turns=4, system_prompt="Add with the tool."),
):
    results = asyncio.run(env.generate(env.get_dataset(), client, "policy", sampling_args=SAMPLING))
    (output,) = results["outputs"]
    assert output["error"] is None, output["error"]
    assert output["reward"] == 1.0, output
