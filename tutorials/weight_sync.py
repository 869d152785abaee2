"""
Weight sync: from one probability to a killed server
====================================================

During training, the servers that generate for a model need its current weights: after every step
the trainer sends them, without a restart. This tutorial tracks one token's probability across
updates, follows a response that is being generated *during* an update, and then causes failures on
purpose to show how they are reported. It needs no GPU.

``TUTORIAL_URL=http://a:30000,http://b:30000`` uses servers that are already running.
"""

import os
import signal

import matplotlib.pyplot as plt
import torch
from tensordict import TensorDict, set_list_to_stack
from transformers import AutoModelForCausalLM

from torchrl_sglang import (
    AsyncSGLang,
    SamplingParams,
    SGLangWrapper,
    WeightCoverageError,
    behaviour_log_probs,
    smollm2_checkpoint,
)

set_list_to_stack(True).set()  # TorchRL's LLM components need it
torch.manual_seed(0)

# %%
# Two servers and a trainer
# -------------------------
# ``dp_size=2`` starts two servers of the same model. Without a GPU they share the machine's memory
# with each other and with the trainer. ``mem_fraction_static`` is the fraction of the memory that
# may be in use, so it is set high here. The trainer's model is loaded from the same checkpoint.

if url := os.environ.get("TUTORIAL_URL"):
    servers = AsyncSGLang.connect(url.split(","))
else:
    servers = AsyncSGLang.from_pretrained(str(smollm2_checkpoint()), dp_size=2, mem_fraction_static=0.9)

trainer = AutoModelForCausalLM.from_pretrained(servers.pool.info.model_path, dtype=torch.float32).eval()
optimizer = torch.optim.AdamW(trainer.parameters(), lr=5e-6)

# %%
# One token's probability across updates
# --------------------------------------
# The prompt is "The capital of France is". The trainer learns to continue it with " Lyon", in small
# steps, and ``update_weights`` sends its weights to the servers after each step. Before and after
# each update the script computes the probability of both words twice: the servers score the
# sentence, the trainer runs a forward pass.

prompt = servers.tokenizer.encode("The capital of France is")
right, wrong = (servers.tokenizer.encode(word, add_special_tokens=False)[0] for word in (" Paris", " Lyon"))


def trainer_log_prob(token):
    return trainer(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[token]


def server_log_prob(token):
    (reply,) = servers.pool.score([[*prompt, token]])
    return torch.tensor(reply.prompt_logprobs[-1])


def probabilities():
    """Probabilities of both words, by the servers and by the trainer."""
    with torch.no_grad():
        sources = (server_log_prob, trainer_log_prob)
        return [[log_prob(word).exp().item() for word in (right, wrong)] for log_prob in sources]


history = [probabilities()]
for _ in range(8):
    (-trainer_log_prob(wrong)).backward()
    optimizer.step()
    optimizer.zero_grad()
    history.append(probabilities())  # the trainer has changed, the servers have not
    report = servers.update_weights(trainer)
    history.append(probabilities())

# %%
# Between two versions the trainer has changed and the servers have not; when ``update_weights``
# returns, they agree again.

served, trained = torch.tensor(history).unbind(1)  # each of shape (measurements, words)
versions = torch.arange(len(history)) / 2
figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
for column, (word, color) in enumerate((("Paris", "#2166ac"), ("Lyon", "#b2182b"))):
    axes.step(versions, served[:, column], where="post", color=color, linewidth=2, label=f"{word}, by the servers")
    axes.plot(versions, trained[:, column], "o", color=color, markersize=5, label=f"{word}, by the trainer")
axes.set(xlabel="weight version on the servers", ylabel="probability", ylim=(0, None))
axes.set_title('The next word after "The capital of France is"', loc="left")
axes.legend(frameon=False)
plt.show()
difference = (served - trained)[::2].abs().max()  # every second measurement follows a sync
print(f"largest difference between servers and trainer after a sync: {difference:.1e}")

# %%
# ``update_weights`` returns only after the verification: every server scores a fixed prompt, and the
# log-probs are compared with each other and with the trainer's. Its report lists what was done and
# how long each phase took. The servers run on the trainer's host, so they read the weights from memory
# that it shares with them (``ipc``). Servers on other hosts get them by ``broadcast``, and both may be
# in one update.

megabytes = report.num_bytes / 1e6
print(f"version {report.version}: {megabytes:.1f} MB in {report.num_buckets} buckets by {report.transport}")
print("seconds:", {phase: round(seconds, 2) for phase, seconds in report.seconds.items()})
print(f"generation was paused for {report.generation_paused_s:.2f} s; the whole sync took {report.total_s:.2f} s")
print(f"largest log-prob difference in the verification: {report.max_logprob_gap:.1e}")
print("servers hold:", sorted(report.server_weights.values()))

# %%
# In a training loop a TorchRL collector does this: with
# ``weight_sync_schemes={"policy": SGLangWeightSyncScheme(servers)}``,
# ``collector.update_policy_weights_(model)`` does the same.
#
# A response generated during an update
# -------------------------------------
# Long responses need not be discarded when new weights arrive. The servers pause, load the weights,
# and continue the responses. Here the update is sent when twelve tokens have arrived; the new
# weights generate the rest, and the reply reports which version generated which tokens.

old = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
with torch.no_grad():
    for parameter in trainer.parameters():
        parameter.add_(0.02 * parameter.std().nan_to_num() * torch.randn_like(parameter))

before = servers.weight_version
story = servers.tokenizer.encode("Once upon a time there was a")
stream = servers.stream(story, return_logprobs=True, max_new_tokens=120, ignore_eos=True)
for reply in stream:
    if servers.weight_version == before and len(reply.output_ids) >= 12:
        report = servers.update_weights(trainer)

for span in reply.weight_spans:
    print(f"tokens {span.start:3} to {span.end - 1:3} were generated by version {span.version.split('@')[0]}")
print(f"pause mode for requests in flight: {report.pause}")

# %%
# To check this, the trainer scores the response twice: with the weights before the update, and with
# those after it. Up to the boundary the recorded log-probs match the old weights, after it the new
# ones.

new = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
recorded, ids = torch.tensor(reply.output_logprobs), torch.tensor(reply.output_ids)
gaps = {}
for label, weights in (("old", old), ("new", new)):
    trainer.load_state_dict(weights)
    with torch.no_grad():
        logits = trainer(torch.tensor([story + reply.output_ids])).logits[0, len(story) - 1 : -1]
    gaps[label] = (behaviour_log_probs(logits, ids, SamplingParams()) - recorded).abs().clamp(min=1e-7)

figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
for label, color in (("old", "#2166ac"), ("new", "#b2182b")):
    axes.semilogy(
        gaps[label], ".-", linewidth=0.7, markersize=4, color=color, label=f"to the trainer's {label} weights"
    )
for span in reply.weight_spans[1:]:
    axes.axvline(span.start - 0.5, color="grey", linestyle="--", linewidth=1)
axes.set(xlabel="token of the response", ylabel="log-prob difference", ylim=(3e-8, 10))
axes.set_title("Which weights generated which token (dashed: the boundary that the reply reports)", loc="left")
axes.legend(frameon=False, loc="center right")
plt.show()

# %%
# A policy returns the same information per token as ``generation.weight_version``, aligned with
# ``tokens.response``. Asynchronous training computes its staleness limits and importance weights
# from it.

policy = SGLangWrapper(servers, input_mode="tokens", generate_kwargs={"max_new_tokens": 8})
out = policy(TensorDict({("tokens", "prompt"): torch.tensor([story])}, batch_size=1))
print(out[0]["generation"].weight_version.tolist())

# %%
# How failures are reported
# -------------------------
# SGLang itself answers 200 to a tensor whose name it doesn't know, and keeps the old one. So all
# tensors are compared with the served checkpoint before the first byte is sent. A tensor with a NaN
# is refused by name:

trainer.load_state_dict(new)
version = servers.weight_version
with torch.no_grad():
    trainer.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
try:
    servers.update_weights(trainer)
except WeightCoverageError as error:
    print(error)
trainer.load_state_dict(new)

# %%
# So are a tensor of a wrong shape, a missing tensor, and a tensor whose name is misspelled.

weights = {name: tensor for name, tensor in trainer.state_dict().items() if name != "lm_head.weight"}
weights["model.norm.weight"] = torch.ones(3)
weights["model.layers.0.mlp.up_proj.wieght"] = weights.pop("model.layers.0.mlp.up_proj.weight")
try:
    servers.update_weights(weights)
except WeightCoverageError as error:
    print(error)
    print("what the servers hold:", set(error.server_weights.values()))
print("the version is still the same:", servers.weight_version == version)

# %%
# A server that dies
# ------------------
# Now the script kills one of the two servers, as the kernel does when memory runs out. (It kills no
# server that was already running.) During the next batch the other server generates the dead
# server's share, and the dead one is quarantined.

if servers.servers:
    os.kill(servers.servers[1].pid, signal.SIGKILL)

replies = servers.generate(["Red", "Green", "Blue", "Black", "White", "Brown"], max_new_tokens=8)
print(f"{len(replies)} responses; in routing: {len(servers.pool.healthy)} of {len(servers.pool.clients)} servers")
for reason in servers.pool.quarantined.values():
    print("quarantined:", reason)

# %%
# The next update restores it: a server that ``from_pretrained`` started is restarted at its old
# address, receives all weights, is verified, and is in routing again.

report = servers.update_weights(trainer)
print(f"version {report.version}; in routing: {len(servers.pool.healthy)} of {len(servers.pool.clients)} servers")
print(f"that took {report.total_s:.0f} s, most of it the server's start")

# %%
# A server that dies, hangs or refuses *in the middle* of an update is harder to show on a page. The
# call raises ``WeightUpdateError`` within a deadline. Its ``server_weights`` says for each server
# whether it holds the ``old``, the ``new`` or ``mixed`` weights or is ``stuck``. A server with mixed
# weights generates nothing until a full sync succeeds. The test
# ``tests/loop/test_failure_matrix.py`` covers every such case.

servers.shutdown()
