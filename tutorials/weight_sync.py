"""
Weight sync: from one probability to a killed server
====================================================

While a model is trained, the servers that generate for it must follow: after every step they get
the trainer's weights, over the network, without a restart. This tutorial watches one token's
probability while that happens, follows a response that is being generated *through* an update, and
then breaks things on purpose to show what failure looks like. It needs no GPU.

With servers of your own running, ``TUTORIAL_URL=http://a:30000,http://b:30000`` uses those.
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

set_list_to_stack(True).set()  # TorchRL's language model parts rely on it
torch.manual_seed(0)

# %%
# Two servers and a trainer
# -------------------------
# ``dp_size=2`` starts two servers of the same model. Without a GPU they share the machine's memory
# with each other and with the trainer, so a server must not mind that most of it is taken:
# ``mem_fraction_static`` says how much may be. The trainer's model is loaded from the same checkpoint.

if url := os.environ.get("TUTORIAL_URL"):
    servers = AsyncSGLang.connect(url.split(","))
else:
    servers = AsyncSGLang.from_pretrained(str(smollm2_checkpoint()), dp_size=2, mem_fraction_static=0.9)

trainer = AutoModelForCausalLM.from_pretrained(servers.pool.info.model_path, dtype=torch.float32).eval()
optimizer = torch.optim.AdamW(trainer.parameters(), lr=5e-6)

# %%
# One token's probability across updates
# --------------------------------------
# The question is what comes after "The capital of France is". The trainer is taught to say " Lyon",
# one small step at a time, and after each step its weights go to the servers with
# ``update_weights``. Then both are asked: the servers by scoring the sentence, the trainer by a
# forward pass.

prompt = servers.tokenizer.encode("The capital of France is")
right, wrong = (servers.tokenizer.encode(word, add_special_tokens=False)[0] for word in (" Paris", " Lyon"))


def trainer_log_prob(token):
    return trainer(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[token]


def server_log_prob(token):
    (reply,) = servers.pool.score([[*prompt, token]])
    return torch.tensor(reply.prompt_logprobs[-1])


def look():
    """Probabilities of both words, by the servers and by the trainer."""
    with torch.no_grad():
        return [[said(word).exp().item() for word in (right, wrong)] for said in (server_log_prob, trainer_log_prob)]


history = [look()]
for _ in range(8):
    (-trainer_log_prob(wrong)).backward()
    optimizer.step()
    optimizer.zero_grad()
    history.append(look())  # the trainer has moved, the servers have not
    report = servers.update_weights(trainer)
    history.append(look())

# %%
# Between two versions the trainer has moved and the servers have not; when ``update_weights``
# returns, they are together again.

served, trained = torch.tensor(history).unbind(1)  # each of shape (looks, words)
versions = torch.arange(len(history)) / 2
figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
for column, (word, color) in enumerate((("Paris", "#2166ac"), ("Lyon", "#b2182b"))):
    axes.step(versions, served[:, column], where="post", color=color, linewidth=2, label=f"{word}, by the servers")
    axes.plot(versions, trained[:, column], "o", color=color, markersize=5, label=f"{word}, by the trainer")
axes.set(xlabel="weight version on the servers", ylabel="probability", ylim=(0, None))
axes.set_title('What comes after "The capital of France is"', loc="left")
axes.legend(frameon=False)
plt.show()
apart = (served - trained)[::2].abs().max()  # every second look came after a sync
print(f"largest difference between servers and trainer after a sync: {apart:.1e}")

# %%
# ``update_weights`` returns only when every server has *proven* that it answers as the new model: a
# fixed prompt is scored everywhere and compared. Its report says what was done and where the time
# went.

megabytes = report.num_bytes / 1e6
print(f"version {report.version}: {megabytes:.1f} MB in {report.num_buckets} buckets by {report.transport}")
print("seconds:", {phase: round(seconds, 2) for phase, seconds in report.seconds.items()})
print(f"servers generated nothing for {report.generation_paused_s:.2f} s; all of it took {report.total_s:.2f} s")
print(f"largest log-prob difference in the proof: {report.max_logprob_gap:.1e}")
print("servers hold:", sorted(report.server_weights.values()))

# %%
# In a training loop nobody calls this by hand: a TorchRL collector that was given
# ``weight_sync_schemes={"policy": SGLangWeightSyncScheme(servers)}`` does the same in
# ``collector.update_policy_weights_(model)``.
#
# A response that lived through an update
# ---------------------------------------
# Long responses need not be thrown away when new weights arrive. The servers are paused, take the
# weights, and go on where they were. Here the update is sent when twelve tokens have arrived; the
# rest is made by the new weights, and the reply says which is which.

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
    print(f"tokens {span.start:3} to {span.end - 1:3} were made by version {span.version.split('@')[0]}")
print(f"requests in flight were handled by: {report.pause}")

# %%
# That can be checked. The response is scored by the trainer twice: with the weights before the
# update, and with those after it. Up to the seam the recorded log-probs are those of the old
# weights, behind it those of the new ones.

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
axes.set_title("Which weights made which token (dashed: where the reply says the new ones begin)", loc="left")
axes.legend(frameon=False, loc="center right")
plt.show()

# %%
# A policy gives the same facts per token as ``generation.weight_version``, aligned with
# ``tokens.response``; that is what the staleness limits and importance weights of asynchronous
# training are made from.

policy = SGLangWrapper(servers, input_mode="tokens", generate_kwargs={"max_new_tokens": 8})
out = policy(TensorDict({("tokens", "prompt"): torch.tensor([story])}, batch_size=1))
print(out[0]["generation"].weight_version.tolist())

# %%
# What failure looks like
# -----------------------
# SGLang itself answers 200 to a tensor whose name it doesn't know, and goes on with the old one. So
# everything is compared with the served checkpoint before the first byte is sent. A NaN is refused
# by name:

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
# ... and so are a tensor of a wrong shape, one that is missing, and one with a slip of the pen in
# its name.

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
# Now one of the two servers is killed, as the kernel does when memory runs out. (Servers of yours
# are left alone.) The next batch notices: what was sent to the dead server is generated by the
# other, and the dead one is taken out of routing.

if servers.servers:
    os.kill(servers.servers[1].pid, signal.SIGKILL)

replies = servers.generate(["Red", "Green", "Blue", "Black", "White", "Brown"], max_new_tokens=8)
print(f"{len(replies)} responses; in routing: {len(servers.pool.healthy)} of {len(servers.pool.clients)} servers")
for reason in servers.pool.quarantined.values():
    print("out of routing:", reason)

# %%
# The next update heals it: a server that was started here is started again, at its old address,
# receives everything, proves it, and is back in routing.

report = servers.update_weights(trainer)
print(f"version {report.version}; in routing: {len(servers.pool.healthy)} of {len(servers.pool.clients)} servers")
print(f"that took {report.total_s:.0f} s, most of it the server's start")

# %%
# A server that dies, hangs or refuses *in the middle* of an update is harder to show on a page: the
# call ends with ``WeightUpdateError`` within a deadline, its ``server_weights`` says for each
# server whether it holds the ``old``, the ``new`` or ``mixed`` weights or is ``stuck``, and a
# server with mixed weights serves nothing until a sync has succeeded. The test
# ``tests/loop/test_failure_matrix.py`` tries every such case.

servers.shutdown()
