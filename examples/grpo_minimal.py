"""GRPO on one page: TorchRL trains a model, SGLang generates with it. No GPU needed: python examples/grpo_minimal.py

SmolLM2-135M-Instruct learns to add: in 16 steps of about 17 s, on 2 CPU cores, the mean reward goes from 0.1 to 0.8.
With --one-gpu, model and server share one GPU, whose memory the server releases while the model trains."""

import argparse
import os
import re
import time
from contextlib import nullcontext

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: its waiting threads leave the cores to the server

import torch
from torch.utils.data import DataLoader
from torchrl.collectors import Collector
from torchrl.envs import Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage
from transformers import AutoModelForCausalLM

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, SGLangWrapper, smollm2_checkpoint

MODEL = str(smollm2_checkpoint())  # or another chat model, such as "Qwen/Qwen3-0.6B"
STEPS, BATCH, ANSWERS = 16, 32, 8  # a step: 32 answers, 8 to each of 4 questions


def reward(answer: str, total: str, ended: bool) -> float:
    """0.7 for the right number at the end, up to 0.2 for digits, 0.1 for ending by itself; 0 without a number."""
    numbers = re.findall(r"\d+", answer)
    return 0.7 * (numbers[-1] == total) + 0.2 * len("".join(numbers)) / len(answer) + 0.1 * ended if numbers else 0.0


class Reward(Transform):
    def _step(self, td, next_td):
        ended = (~td["generation"].truncated).tolist()
        rewards = list(map(reward, td["text", "response"], td["answer"], ended))
        next_td["reward"] = torch.tensor(rewards).reshape(-1, 1, 1)  # (answers, 1, 1), as GRPOLoss needs it
        next_td["done"] = next_td["terminated"] = torch.ones_like(next_td["done"])  # one answer ends the episode
        return next_td


parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--one-gpu", action="store_true", help="model and server share the first GPU; without one, the CPU")
one_gpu = parser.parse_args().one_gpu
if one_gpu and not torch.cuda.is_available():
    print("--one-gpu: torch finds no GPU, so model and server use the CPU, and no GPU memory is released")
    one_gpu = False
flags = ("--random-seed", "0", "--enable-memory-saver") if one_gpu else ("--random-seed", "0")

torch.manual_seed(0)
sums = [(a, b) for a in range(1, 10) for b in range(1, 10)]
questions = [{"query": f"What is {a} + {b}? Answer with only the number.", "answer": str(a + b)} for a, b in sums]
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
model.to("cuda:0" if one_gpu else "cpu")  # on two GPUs "cuda:1": servers take the first
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

with AsyncSGLang.from_pretrained(MODEL, extra_args=flags, mem_fraction_static=0.5 if one_gpu else None) as servers:
    sampling = {"max_new_tokens": 12, "temperature": 1.0, "skip_special_tokens": True}  # GRPOLoss assumes temperature 1
    policy = SGLangWrapper(servers, input_mode="history", generate_kwargs=sampling)
    loader, tokenizer = DataLoader(questions, shuffle=True), servers.tokenizer
    env = ChatEnv.from_dataloader(loader, repeats=ANSWERS, batch_size=(BATCH,), tokenizer=tokenizer, system_prompt="")
    env = env.append_transform(Reward())
    options = {"frames_per_batch": BATCH, "total_frames": STEPS * BATCH, "auto_register_policy_transforms": False}
    collector = Collector(env, policy, weight_sync_schemes={"policy": SGLangWeightSyncScheme(servers)}, **options)
    actor = TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=False)
    loss_module = GRPOLoss(actor, entropy_bonus=False, aggregation="prompt_mean")
    start = time.perf_counter()
    for rollout in collector:
        batch = MCAdvantage(ANSWERS).inv(rollout.to(model.device))  # writes "advantage", in groups of one question
        spread = batch["next", "reward"].unflatten(0, (-1, ANSWERS)).std(1).repeat_interleave(ANSWERS, 0)
        batch["advantage"] *= spread > 1e-6  # equal rewards: exactly 0, where MCAdvantage scales up a rounding error
        with servers.offloaded() if one_gpu else nullcontext():
            for part in batch.split(8):  # micro-batches, whose gradients add up
                loss = loss_module(part)
                (loss.loss_objective * len(part) / BATCH).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        collector.update_policy_weights_(actor)  # the server holds the new weights when this returns, or it raises
        seconds, mean = time.perf_counter() - start, batch["next", "reward"].mean()
        print(f"weights v{servers.weight_version}  reward {mean:.3f}  ESS {loss.ESS:.4f}  {seconds:.0f} s")
