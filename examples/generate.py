"""Generate answers through SGLang and print the policy's output: text, tokens, log-probs and stop reason.

    python examples/generate.py                            # launches a server with SmolLM2; no GPU needed
    python examples/generate.py --url http://host:30000    # attaches to a running server

Expected of SmolLM2: "The capital of France is Paris.", 8 tokens with the end-of-turn mark, ended by "stop".
"""

import argparse

from tensordict import TensorDict, set_list_to_stack
from torchrl.data.llm import History
from torchrl.modules.llm import ChatHistory

from torchrl_sglang import AsyncSGLang, SGLangWrapper

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--url", help="base URL of a running server; without it, one is launched")
parser.add_argument("questions", nargs="*", default=["What is the capital of France?", "Write a line about rain."])
args = parser.parse_args()
set_list_to_stack(True).set()  # TorchRL's language model classes need it

if args.url:
    servers = AsyncSGLang.connect(args.url)
else:
    servers = AsyncSGLang.from_pretrained("SmolLM2", progress=True)

with servers:
    policy = SGLangWrapper(servers, input_mode="history", generate_kwargs={"max_new_tokens": 40, "temperature": 0})
    chats = History.from_chats([[{"role": "user", "content": question}] for question in args.questions])
    out = policy(TensorDict(history=ChatHistory(prompt=chats), batch_size=len(args.questions)))
    for row in out.unbind(0):
        ids, log_probs = row["tokens", "response"], row["log_probs", "response"]
        print(f"{row['text', 'response']!r}\n  {len(ids)} tokens, log-prob {log_probs.sum():.2f}, ", end="")
        print(f"ended by {row['generation'].finish_reason!r}, weights v{int(row['generation'].weight_version[-1])}")
