"""dspy, unmodified: ReAct with a tool, whose trajectory it writes into the prompt itself."""

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import dspy

base_url, api_key = sys.argv[1:]


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


lm = dspy.LM("openai/policy", api_base=base_url, api_key=api_key, cache=False, temperature=1.0, max_tokens=400)
dspy.configure(lm=lm)
assert dspy.ReAct("question -> answer", tools=[add], max_iters=3)(question="What is 2 + 3?").answer == "5"
