"""
Rollouts as TensorDicts, and what log-probs mean
================================================

A policy gradient needs three facts about every sampled token: its id, the probability that the
policy gave it when it was sampled, and the version of the policy. This tutorial generates a few
answers on a real SGLang server, shows the returned TensorDict, and compares its log-probs with the
model's own. It needs no GPU.

``TUTORIAL_URL=http://host:30000 python tutorials/rollouts.py`` uses a server that is already running.
"""

import os
import textwrap
import warnings

import matplotlib.pyplot as plt
import torch
from tensordict import TensorDict, set_list_to_stack
from torchrl.data.llm import History
from torchrl.modules.llm import ChatHistory
from transformers import AutoModelForCausalLM

from torchrl_sglang import AsyncSGLang, SGLangWrapper, smollm2_checkpoint, trainer_log_probs

set_list_to_stack(True).set()  # TorchRL's LLM components need it
torch.manual_seed(0)

# %%
# A server and a policy
# ---------------------
# ``from_pretrained`` starts SGLang and waits until it is ready: about half a minute without a GPU.
# ``connect`` attaches to a server that is already running, on this or another machine. Both return
# the same kind of object.

if url := os.environ.get("TUTORIAL_URL"):
    servers = AsyncSGLang.connect(url)
else:
    servers = AsyncSGLang.from_pretrained(str(smollm2_checkpoint()))  # SmolLM2-135M-Instruct, a small chat model

policy = SGLangWrapper(servers, input_mode="history", generate_kwargs={"max_new_tokens": 24, "temperature": 0})

# %%
# The policy is an ordinary TorchRL module: it takes a TensorDict and returns one with more entries.
# In history mode the input is a batch of conversations. Temperature 0 takes the most likely token
# each time; training samples at temperature 1, as a later section does.

questions = ["What is the capital of France?", "Name a colour.", "Write a line about rain."]
chats = History.from_chats([[{"role": "user", "content": question}] for question in questions])
prompts = TensorDict(history=ChatHistory(prompt=chats), batch_size=len(questions))

out = policy(prompts.copy())
for question, answer in zip(questions, out["text", "response"], strict=True):
    print(f"{question:32} {answer!r}")

# %%
# The entries of the output
# -------------------------
# The keys are those of TorchRL's own ``vLLMWrapper`` and ``TransformersWrapper``, so TorchRL's
# losses, transforms and replay buffers work with it. Each of ``text``, ``tokens``, ``masks`` and
# ``log_probs`` has a ``prompt``, a ``response`` and a ``full`` part. Answers differ in length, so
# entries are *ragged*: one tensor for each sequence, read with ``as_list=True``.

for key in (("tokens", "prompt"), ("tokens", "response"), ("tokens", "full"), ("log_probs", "response")):
    rows = out.get(key, as_list=True)
    print(f"{'.'.join(key):22} {rows[0].dtype!s:14} lengths {[len(row) for row in rows]}")

# %%
# ``pad_output=True`` returns dense tensors: prompts are padded on the left and responses on the
# right. The mask marks the real tokens.

padded = policy.get_new_version(pad_output=True)(prompts.copy())
print("tokens.full                 ", tuple(padded["tokens", "full"].shape))
print("log_probs.response          ", tuple(padded["log_probs", "response"].shape))
print("masks.all_attention_mask    ", padded["masks", "all_attention_mask"].sum(-1).tolist(), "real tokens")

# %%
# ``num_samples`` generates several answers to each prompt and adds a batch dimension, as GRPO
# needs. Each server still gets one HTTP request.

sampling = {"max_new_tokens": 24, "temperature": 1.0}
grouped = policy.get_new_version(num_samples=4, generate_kwargs=sampling)(prompts.copy())
print("batch shape", tuple(grouped.batch_size))
for answer in grouped["text", "response"][1]:
    print(repr(answer))

# %%
# Facts beside the tokens
# -----------------------
# ``generation`` holds the other facts of a reply: why the answer ended, how many prompt tokens were
# in the server's cache, which weights generated each token, how it was sampled.

for row in [*out["generation"].unbind(0), *grouped["generation"][1].unbind(0)]:
    print(
        f"ended by {row.finish_reason!r}, truncated: {bool(row.truncated)}; "
        f"{int(row.prompt_tokens)} prompt tokens, {int(row.cached_tokens)} of them cached; "
        f"{int(row.completion_tokens)} response tokens by weights {row.weight_version.unique().tolist()}"
    )

# %%
# ``truncated`` matters for training: the policy did not end an answer that was cut off at
# ``max_new_tokens``, so a reward for its ending would be noise.
#
# What a log-prob is
# ------------------
# ``log_probs.response`` holds one number per token: the natural logarithm of the probability that
# the server's model gave to the sampled token. The figure shows the first answer, token by token.

tokens = [servers.tokenizer.decode(token) for token in out[0]["tokens", "response"].tolist()]
probabilities = out[0]["log_probs", "response"].exp().tolist()

figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
axes.bar(range(len(tokens)), probabilities, color="#4393c3")
axes.set_xticks(range(len(tokens)), [repr(token)[1:-1] for token in tokens], rotation=60, ha="right")
axes.set(ylim=(0, 1.05), ylabel="probability when sampled")
axes.set_title(f"Probability of each token of the answer to {questions[0]!r}", loc="left")
plt.show()

# %%
# The trainer computes the same numbers
# -------------------------------------
# An importance ratio compares two log-probs of one token: the one recorded by the server, and the
# one of the model that is being trained. Before the first update these are the same model, so every
# ratio must be one. Otherwise the loss starts from wrong ratios, and no error is raised. This is how
# to check it.

trainer = AutoModelForCausalLM.from_pretrained(servers.pool.info.model_path, dtype=torch.float32).eval()


@torch.no_grad()
def largest_gap(recorded, sampling, **options):
    served = torch.cat(recorded.get(("log_probs", "response"), as_list=True))
    return (served - torch.cat(trainer_log_probs(trainer, recorded, sampling, **options))).abs().max().item()


print(f"largest difference over all tokens: {largest_gap(out, policy.sampling_params):.1e}")

# %%
# Server and trainer compute in float32 here, so the difference is rounding. In bfloat16 expect up to
# 0.07.
#
# Temperature
# -----------
# At a temperature other than 1, tokens are sampled from sharper or flatter probabilities, and the
# server records the log-probs of that distribution: the log-softmax of ``logits / temperature``. A
# loss that uses the trainer's logits unchanged would compare two different distributions. The figure
# shows both comparisons for a policy at temperature 0.6.

cold = policy.get_new_version(generate_kwargs={"max_new_tokens": 24, "temperature": 0.6}, num_samples=4)
sampled = cold(prompts.copy()).reshape(-1)
recorded = torch.cat(sampled.get(("log_probs", "response"), as_list=True))
with torch.no_grad():
    tempered = torch.cat(trainer_log_probs(trainer, sampled, cold.sampling_params))
    raw = torch.cat(trainer_log_probs(trainer, sampled, policy.sampling_params))

figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharex=True, sharey=True)
comparisons = {"Trainer's logits unchanged": raw, "Trainer's logits divided by 0.6": tempered}
for axes, (title, computed) in zip(panels, comparisons.items(), strict=True):
    axes.axline((0, 0), slope=1, color="#b2182b", linewidth=1)
    axes.scatter(recorded, computed, s=14, color="#2166ac", alpha=0.6)
    axes.set(xlabel="log-prob recorded by the server", aspect="equal")
    axes.set_title(title, loc="left")
panels[0].set_ylabel("log-prob computed by the trainer")
plt.show()
for computed, treatment in ((raw, "unchanged"), (tempered, "divided by 0.6")):
    ratios = (computed - recorded).exp()
    print(f"importance ratios, logits {treatment}: from {ratios.min():.4f} to {ratios.max():.4f}")

# %%
# In a training loop ``temper(model, 0.6)`` divides the model's logits from then on, so that any
# TorchRL loss uses the distribution that was sampled.
#
# Top-p, top-k, min-p
# -------------------
# These options remove unlikely tokens before sampling. SGLang records log-probs from *before* this
# truncation. They are right for the model and wrong for the sampling distribution: the
# probabilities of the remaining tokens don't add up to one. The policy reports this, once as a
# warning and in every row as ``generation.exact_log_probs``.

nucleus = {"max_new_tokens": 24, "top_p": 0.8, "top_k": 50}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    cut = policy.get_new_version(generate_kwargs=nucleus)(prompts.copy())
print(textwrap.fill(str(caught[-1].message), 100))
print("exact_log_probs:", cut["generation"].exact_log_probs.tolist())

# %%
# With ``exact_log_probs=True`` the server also reports which tokens remained, and the recorded
# log-prob is normalised over those. The trainer can compute the same from ``generation.support``.

exact = policy.get_new_version(generate_kwargs=nucleus, exact_log_probs=True)
sampled = exact(prompts.copy())
support_sizes = (sampled[0]["generation"].support >= 0).sum(-1).tolist()
print("exact_log_probs:", sampled["generation"].exact_log_probs.tolist())
print("number of remaining tokens, first answer:", support_sizes)
print(f"largest difference: {largest_gap(sampled, exact.sampling_params, generation_key='generation'):.1e}")

# %%
# Scoring
# -------
# With ``generate=False`` the same class scores existing sequences. Use it to serve a reference model
# for a KL term, or to score one model's answers with another model.

scorer = SGLangWrapper(servers, input_mode="tokens", generate=False)
scored = scorer(out.select("tokens"))
for i in range(len(questions)):
    full, prompt_length = scored[i]["log_probs", "full"], len(out[i]["tokens", "prompt"])
    gap = (full[prompt_length:] - out[i]["log_probs", "response"]).abs().max()
    print(f"{len(full)} tokens scored, the answer's log-probs differ by {gap:.1e} from those recorded while generating")

# %%
# ``shutdown`` ends a server that ``from_pretrained`` started (so does the end of a ``with`` block or
# of the program).

servers.shutdown()
