"""
GRPO from scratch, to a learning curve
======================================

GRPO (group relative policy optimisation) needs no value network: it samples several answers to a
question and reinforces those with a higher reward than the others. This tutorial writes the whole
loop without a collector and without a loss module, so that every number in it is visible: a real
SGLang server generates, plain PyTorch trains, and the server gets the weights after each step. A
135 million parameter chat model learns to do sums on a CPU in about five minutes.

``TUTORIAL_STEPS=3 python tutorials/grpo_from_scratch.py`` runs three steps only;
``TUTORIAL_URL=http://host:30000`` uses a server that is already running.
"""

import os
import random
import re
import time

import matplotlib.pyplot as plt
import torch
from tensordict import TensorDict, set_list_to_stack
from torch.nn.utils.rnn import pad_sequence
from torchrl.data.llm import History
from torchrl.modules.llm import ChatHistory
from transformers import AutoModelForCausalLM

from torchrl_sglang import AsyncSGLang, SGLangWrapper, smollm2_checkpoint

set_list_to_stack(True).set()  # TorchRL's language model parts rely on it
random.seed(0)
torch.manual_seed(0)

STEPS = int(os.environ.get("TUTORIAL_STEPS", "14"))
QUESTIONS, ANSWERS = 4, 8  # per step: 4 questions, each answered 8 times

# %%
# Server and trainer
# ------------------
# The server holds one copy of the model, the trainer another. The server's random seed is set when
# it starts. Both compute in float32, so they agree on log-probs to about 1e-5, and a larger
# difference indicates an error.

if url := os.environ.get("TUTORIAL_URL"):
    servers = AsyncSGLang.connect(url)
else:
    servers = AsyncSGLang.from_pretrained(str(smollm2_checkpoint()), extra_args=("--random-seed", "0"))

policy = SGLangWrapper(
    servers,
    input_mode="history",
    num_samples=ANSWERS,
    generate_kwargs={"max_new_tokens": 12, "skip_special_tokens": True},  # in the text; the ids keep them
)
trainer = AutoModelForCausalLM.from_pretrained(servers.pool.info.model_path, dtype=torch.float32).eval()
optimizer = torch.optim.AdamW(trainer.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

# %%
# The task and its reward
# -----------------------
# A question is a sum of two digits. A small model hardly ever answers with the bare number, and it
# learns nothing from a reward that it never gets. So the reward also gives partial credit for digits
# and for ending the answer. Before training, "What is 5 + 2?" gets these answers:


def ask(sums):
    """The questions as a TensorDict of conversations."""
    chats = [
        [
            {"role": "system", "content": ""},  # or the model's chat template would put in its own
            {"role": "user", "content": f"What is {a} + {b}? Answer with only the number."},
        ]
        for a, b in sums
    ]
    return TensorDict(history=ChatHistory(prompt=History.from_chats(chats)), batch_size=len(chats))


def reward(answer, total, ended):
    """0.7 for the right number at the end, 0.2 times the share of digits, 0.1 for ending by itself."""
    numbers = re.findall(r"\d+", answer)
    if not numbers:
        return 0.0
    return 0.7 * (numbers[-1] == str(total)) + 0.2 * sum(map(len, numbers)) / len(answer) + 0.1 * ended


for answer in policy(ask([(5, 2)]))["text", "response"][0]:
    print(repr(answer))

# %%
# The trainer's log-probs
# -----------------------
# A language model gives the log-prob of every token of a sequence in one forward pass: logits at
# position ``t`` predict token ``t + 1``. Sequences are padded on the right; a causal model's earlier
# positions do not depend on the padding.


def response_log_probs(sequences, prompt_lengths):
    """Log-probs of response tokens under the trainer: one tensor per sequence."""
    logits = trainer(pad_sequence(sequences, batch_first=True)).logits
    return [
        logits[i, start - 1 : len(ids) - 1].log_softmax(-1).gather(-1, ids[start:, None])[:, 0]
        for i, (ids, start) in enumerate(zip(sequences, prompt_lengths, strict=True))
    ]


# %%
# One step
# --------
# 1. The server answers every question ``ANSWERS`` times.
# 2. An answer's *advantage* is its reward minus the mean of its group, divided by the group's
#    standard deviation.
# 3. The loss raises the log-probs of tokens with a positive advantage and lowers the others. The
#    ratio between the trainer's probability and the recorded one is clipped, which limits the
#    change from one batch.
# 4. ``update_weights`` sends the weights to the server. When it returns, the next answers come from
#    the new model.


def grpo_step(step):
    sums = [(random.randint(1, 9), random.randint(1, 9)) for _ in range(QUESTIONS)]
    start = time.perf_counter()
    rollout = policy(ask(sums))  # batch shape (QUESTIONS, ANSWERS)
    generated = time.perf_counter()

    ended = ~rollout["generation"].truncated
    rewards = torch.zeros(QUESTIONS, ANSWERS)
    for i, (a, b) in enumerate(sums):
        for j, answer in enumerate(rollout["text", "response"][i]):
            rewards[i, j] = reward(answer, a + b, bool(ended[i, j]))
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).reshape(-1)

    flat = rollout.reshape(-1)
    sequences = flat.get(("tokens", "full"), as_list=True)
    prompt_lengths = [len(ids) for ids in flat.get(("tokens", "prompt"), as_list=True)]
    recorded = flat.get(("log_probs", "response"), as_list=True)
    num_tokens, gap = sum(map(len, recorded)), 0.0
    for part in torch.arange(len(sequences)).split(8):  # a forward and backward pass for 8 answers at a time
        said = torch.cat(response_log_probs([sequences[i] for i in part], [prompt_lengths[i] for i in part]))
        drawn = torch.cat([recorded[i] for i in part])
        advantage = torch.cat([advantages[i].expand(len(recorded[i])) for i in part])
        ratio = (said - drawn).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        (-gain.sum() / num_tokens).backward()
        gap = max(gap, (said - drawn).abs().max().item())
    torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    trained = time.perf_counter()

    report = servers.update_weights(trainer)
    print(
        f"step {step:2}  reward {rewards.mean():.2f}  tokens per answer {num_tokens / rewards.numel():4.1f}  "
        f"largest log-prob gap {gap:.0e}  generate {generated - start:.1f} s, train {trained - generated:.1f} s, "
        f"sync {report.total_s:.1f} s  weights v{report.version}"
    )
    return rewards.mean().item(), gap


# %%
# The loop
# --------
# The *log-prob gap* is the largest difference between the log-prob that the server recorded and the
# one that the trainer computes for the same token before its update. It checks the whole loop: at
# 1e-5 the ratios above are one, and the gradient is the policy gradient. A missed sync or a forgotten
# temperature would show here first. A step takes about 20 seconds on two idle cores; longer steps in
# the run below had to share the cores with other programs.

curve = [grpo_step(step) for step in range(1, STEPS + 1)]

# %%
# Result
# ------
# The same question, answered with the weights of the last step.

figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5.2), layout="constrained", sharex=True, height_ratios=(3, 1))
rewards, gaps = torch.tensor(curve).T
top.plot(range(1, STEPS + 1), rewards, "o-", color="#2166ac", markersize=4)
top.set(ylabel="mean reward", ylim=(0, 1.05))
top.set_title("Sums, learned with GRPO", loc="left")
bottom.semilogy(range(1, STEPS + 1), gaps, "o-", color="#b2182b", markersize=4)
bottom.set(xlabel="step", ylabel="largest\nlog-prob gap", ylim=(1e-7, 1))
bottom.xaxis.get_major_locator().set_params(integer=True)
plt.show()

for answer in policy(ask([(5, 2)]))["text", "response"][0]:
    print(repr(answer))

# %%
# Next steps
# ----------
# ``examples/grpo_minimal.py`` and ``examples/grpo.py`` do the same with TorchRL's own components
# (``ChatEnv``, ``Collector``, ``GRPOLoss``): the collector calls the policy, and
# ``collector.update_policy_weights_(actor)`` sends the weights. For a task of your own, change
# ``ask`` and ``reward``; for a larger model on GPUs, the name in ``from_pretrained``.

servers.shutdown()
