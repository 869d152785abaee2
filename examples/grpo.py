"""Train a language model with GRPO: TorchRL learns while a real SGLang server generates. Runs without a GPU.

    make quickstart                                    # or: python examples/grpo.py
    python examples/grpo.py --model Qwen/Qwen3-0.6B    # another chat model, on a machine with two GPUs

SmolLM2-135M-Instruct is asked "What is 5 + 2? Answer with only the number." At first it rambles, and about one answer
in ten holds the sum. After every step the trainer's weights replace the server's over the network, and the next
answers come from the new model.

Expected on 2 CPU cores, in 6 to 7 minutes: the mean reward goes from 0.16 in the first fifth of the 16 steps to 0.83 in
the last (the answers settle on "5 + 2 = 7"), server and trainer agree on every sampled token's log-prob to 1e-4, 538 MB
of weights reach the server in about a second, and its weight version goes up by one per step.

Files, in outputs/quickstart/: metrics.csv (a line per step), samples.jsonl (a line per answer), report.png, checkpoint/
(the last weights) and checkpoint-previous/ (those before the last step, which gave the last answers).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import re
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import matplotlib.pyplot as plt
import tensordict
import torch
from tensordict import TensorDictBase
from torch.utils.data import DataLoader
from torchrl.collectors import Collector
from torchrl.data import Composite, LazyStackStorage, ReplayBuffer, SamplerWithoutReplacement, Unbounded
from torchrl.envs import Transform, TransformedEnv
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from torchrl_sglang import AsyncSGLang, SGLangWeightSyncScheme, SGLangWrapper, smollm2_checkpoint

QUESTION = "What is {a} + {b}? Answer with only the number."
# ess: effective sample size, 1 when server and trainer agree; entropy: estimated from the sampled tokens, in nats
COLUMNS = (
    *("step", "reward_mean", "response_tokens_mean", "generate_tokens_per_s", "sync_s", "sync_mb", "weight_version"),
    *("logprob_gap_max", "right_rate", "reward_std", "generate_s", "score_s", "train_s", "ess", "clip_fraction"),
    *("kl_approx", "entropy", "grad_norm", "elapsed_s"),
)
STEP_LINE = (
    "step {step:3d} | reward {reward_mean:.3f}, right {right_rate:4.0%} | {response_tokens_mean:4.1f} tokens/answer, "
    "{generate_tokens_per_s:3.0f} tokens/s | generate {generate_s:.1f} s, train {train_s:.1f} s, sync {sync_s:.2f} s "
    "{sync_mb:.0f} MB | weights v{weight_version} | log-prob gap {logprob_gap_max:.1e}"
)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path or hub name of a chat model (default: SmolLM2-135M-Instruct, cached)")
    parser.add_argument("--steps", type=int, default=16, help="collect, train, sync: one step (default 16)")
    parser.add_argument("--questions", type=int, default=4, help="questions per step (default 4)")
    parser.add_argument("--answers", type=int, default=8, help="answers per question, the group of GRPO (default 8)")
    parser.add_argument("--micro-batch", type=int, default=8, help="answers per forward and backward pass (default 8)")
    parser.add_argument("--max-new-tokens", type=int, default=12, help="longest answer (default 12)")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate of AdamW (default 1e-5)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda with two GPUs or more, else cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="server's, and autocast's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    args = parser.parse_args()
    for name in ("steps", "questions", "micro_batch", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.model and args.output.resolve() in Path(args.model).resolve().parents:
        parser.error("--model lies in --output, whose files are replaced: choose another --output")
    if args.answers < 2:
        parser.error("--answers must be at least 2: GRPO compares the answers to one question with each other")
    return args


class SumReward(Transform):
    """0.7 if the last number is the sum, 0.2 times the share of digits, 0.1 for ending in time; 0 without a number."""

    def __init__(self) -> None:
        super().__init__(in_keys=[], out_keys=["reward", "right"])

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        answers, sums = tensordict["text", "response"], tensordict["answer"].tolist()
        ended = (~tensordict["generation"].truncated).tolist()
        reward, right = [], []
        for answer, total, in_time in zip(answers, sums, ended, strict=True):
            numbers = re.findall(r"\d+", answer)
            right.append(bool(numbers) and numbers[-1] == str(total))
            digits = sum(map(len, numbers)) / max(len(answer), 1)
            reward.append(0.7 * right[-1] + 0.2 * digits + 0.1 * in_time if numbers else 0.0)
        next_tensordict["reward"] = torch.tensor(reward).reshape(-1, 1, 1)
        next_tensordict["right"] = torch.tensor(right).reshape(-1, 1, 1)
        for done in ("done", "terminated"):  # one question, one answer
            next_tensordict[done] = torch.ones_like(next_tensordict[done])
        return next_tensordict

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        # one reward per sequence and token: MCAdvantage and GRPOLoss want a token dimension, here of size one
        reward_spec["reward"] = Unbounded((*reward_spec.shape, 1, 1))
        reward_spec["right"] = Unbounded((*reward_spec.shape, 1, 1), dtype=torch.bool)
        return reward_spec


def make_env(tokenizer: PreTrainedTokenizerBase, questions: int, answers: int, seed: int) -> TransformedEnv:
    """Each batch holds ``questions`` questions, ``answers`` times each, one after the other."""
    sums = [{"query": QUESTION.format(a=a, b=b), "answer": a + b} for a in range(1, 10) for b in range(1, 10)]
    shuffled = DataLoader(sums, batch_size=questions, shuffle=True, generator=torch.Generator().manual_seed(seed))
    env = ChatEnv.from_dataloader(
        shuffled,
        repeats=answers,
        batch_size=(questions * answers,),
        tokenizer=tokenizer,
        system_prompt="",  # SmolLM2's template would put a longer one in
    )
    return env.append_transform(SumReward())


@torch.no_grad()
def trainer_log_probs(actor: TransformersWrapper, batch_B: TensorDictBase, micro_batch: int) -> list[torch.Tensor]:
    """Log-prob of every response token under the trainer's model, one float tensor of shape (R,) per answer."""
    scored = [actor(part.select("tokens", "masks")) for part in batch_B.split(micro_batch)]
    full_B_T = [row_T for part in scored for row_T in part.get(("log_probs", "full"), as_list=True)]
    return [row_T[len(p) :] for row_T, p in zip(full_B_T, batch_B.get(("tokens", "prompt"), as_list=True), strict=True)]


def write_samples(file: TextIO, step: int, batch_B: TensorDictBase) -> None:
    """One JSON line per answer."""
    for row in batch_B.unbind(0):
        sample = {
            "step": step,
            "prompt_ids": row["tokens", "prompt"].tolist(),
            "response_ids": row["tokens", "response"].tolist(),
            "log_probs": row["log_probs", "response"].tolist(),
            "reward": row["next", "reward"].item(),
            "weight_version": row["generation"].weight_version.max().item(),
            "prompt": row["text", "prompt"],
            "response": row["text", "response"],
        }
        file.write(json.dumps(sample) + "\n")
    file.flush()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def draw_report(rows: list[dict[str, float]], path: Path) -> None:
    """Three panels over the steps: reward, seconds, log-prob gap."""
    steps = [row["step"] for row in rows]
    fifth = max(1, len(rows) // 5)
    style: dict[str, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e8e8e8",
    }
    with plt.rc_context({**style, "axes.axisbelow": True, "axes.titlelocation": "left", "font.size": 10}):
        figure, (reward, seconds, gap) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")

        reward.plot(steps, [row["reward_mean"] for row in rows], color="#2166ac", marker="o", markersize=4)
        for part in (rows[:fifth], rows[-fifth:]):
            mean = sum(row["reward_mean"] for row in part) / len(part)
            reward.plot([part[0]["step"] - 0.4, part[-1]["step"] + 0.4], [mean] * 2, color="#b2182b", linewidth=3)
            reward.annotate(f"{mean:.2f}", (part[len(part) // 2]["step"], mean - 0.1), color="#b2182b", ha="center")
        reward.set(title="Mean reward (red: first and last fifth)", xlabel="step", ylim=(0, 1.05))

        bottom = [0.0] * len(rows)
        colors = {"generate": "#4393c3", "score": "#d1e5f0", "train": "#f4a582", "sync": "#5aae61"}
        for name, color in colors.items():
            heights = [row[f"{name}_s"] for row in rows]
            label = f"{name} {sum(heights) / len(heights):.1f} s"
            seconds.bar(steps, heights, bottom=bottom, color=color, width=0.8, label=label)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        seconds.set(title="Where a step's time goes", xlabel="step", ylabel="seconds", ylim=(0, max(bottom) * 1.35))
        seconds.legend(loc="upper right", ncols=2, frameon=False, title="mean per step")

        gaps = [row["logprob_gap_max"] for row in rows]
        gap.plot(steps, gaps, color="#2166ac", marker="o", markersize=4)
        gap.axhline(1e-3, color="#b2182b", linestyle="--", linewidth=1)
        gap.annotate("limit for float32", (steps[0], 1.15e-3), color="#b2182b", va="bottom")
        gap.set(title="Largest log-prob gap, server to trainer", xlabel="step", yscale="log")
        gap.set_ylim(min(1e-6, *gaps), max(1e-2, *gaps))
        for axes in (reward, seconds, gap):
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def train(args: argparse.Namespace, bar: tqdm) -> list[dict[str, float]]:
    bar.set_postfix_str("loading the model")
    path = args.model or str(smollm2_checkpoint())
    # The server takes the first GPU, the trainer the last: NCCL does not join two processes on one.
    last_gpu = torch.cuda.device_count() - 1
    on_gpu = last_gpu >= 1 if args.device is None else args.device == "cuda"
    device = torch.device("cuda", last_gpu) if on_gpu else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(path)
    # float32 whatever the server computes in: steps of 1e-5 would vanish in bfloat16; eval(): no dropout, ever
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    actor = TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=False)

    batch_size = args.questions * args.answers
    loss_module = GRPOLoss(actor, entropy_bonus=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    buffer = ReplayBuffer(
        storage=LazyStackStorage(batch_size),
        sampler=SamplerWithoutReplacement(),
        batch_size=args.micro_batch,
        transform=MCAdvantage(grpo_size=args.answers),
    )
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")
    started = time.perf_counter()
    rows: list[dict[str, float]] = []
    with ExitStack() as stack:  # closes everything in reverse order, however this ends
        metrics_file = stack.enter_context((args.output / "metrics.csv").open("w", newline=""))
        samples_file = stack.enter_context((args.output / "samples.jsonl").open("w"))
        servers = AsyncSGLang.from_pretrained(
            path,
            device=device.type,
            dtype=args.dtype,
            extra_args=("--random-seed", str(args.seed)),
            progress=bar.set_postfix_str,
        )
        stack.enter_context(servers)
        metrics = csv.DictWriter(metrics_file, COLUMNS)
        metrics.writeheader()
        policy = SGLangWrapper(
            servers,
            tokenizer=tokenizer,
            input_mode="history",
            generate_kwargs={
                "max_new_tokens": args.max_new_tokens,
                "temperature": 1.0,
                "skip_special_tokens": True,  # in the text that the reward reads; the ids keep them
            },
        )
        scheme = SGLangWeightSyncScheme(servers)
        stack.callback(scheme.shutdown)
        collector = Collector(
            make_env(tokenizer, args.questions, args.answers, args.seed),
            policy,
            frames_per_batch=batch_size,
            total_frames=batch_size * args.steps,
            weight_sync_schemes={"policy": scheme},
            auto_register_policy_transforms=False,
        )
        stack.callback(collector.shutdown)

        bar.set_postfix_str("generating")
        clock = time.perf_counter()
        for step, batch in enumerate(collector, 1):
            batch_B = batch.reshape(-1).to(device)
            generate_s = time.perf_counter() - clock
            if step == args.steps:
                save(model, tokenizer, args.output / "checkpoint-previous")

            bar.set_postfix_str("scoring with the trainer's model")
            clock = time.perf_counter()
            responses_B_R = batch_B.get(("tokens", "response"), as_list=True)
            server_B_R = batch_B.get(("log_probs", "response"), as_list=True)
            with autocast:
                trainer_B_R = trainer_log_probs(actor, batch_B, args.micro_batch)
            gaps = torch.cat([(s - t).abs() for s, t in zip(server_B_R, trainer_B_R, strict=True)])
            score_s, clock = time.perf_counter() - clock, time.perf_counter()

            buffer.empty()
            # MCAdvantage compares the answers to one question and writes "advantage".
            buffer.extend(batch_B.select("query", "tokens", "masks", "log_probs", ("next", "reward"), ("next", "done")))
            num_tokens, seen, parts = sum(map(len, responses_B_R)), 0, []
            for micro_B in buffer:
                with autocast:
                    loss = loss_module(micro_B)
                # A micro-batch's loss is the mean over its tokens; weighted like this, they add up to the batch's.
                share = sum(map(len, micro_B.get(("tokens", "response"), as_list=True))) / num_tokens
                (loss.loss_objective * share).backward()
                parts.append(loss.detach())
                seen += len(micro_B)
                bar.set_postfix_str(f"training {seen}/{batch_size}")
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            train_s, clock = time.perf_counter() - clock, time.perf_counter()

            bar.set_postfix_str("sending the weights")
            collector.update_policy_weights_(actor)
            sync_s, clock = time.perf_counter() - clock, time.perf_counter()

            rewards_B, losses = batch_B["next", "reward"].reshape(-1), torch.stack(parts)
            row = {
                "step": step,
                "reward_mean": rewards_B.mean(),
                "response_tokens_mean": num_tokens / batch_size,
                "generate_tokens_per_s": num_tokens / generate_s,
                "sync_s": sync_s,
                "sync_mb": scheme.last_report.num_bytes / 1e6,
                "weight_version": servers.weight_version,
                "logprob_gap_max": gaps.max(),
                "right_rate": batch_B["next", "right"].float().mean(),
                "reward_std": rewards_B.std(),
                "generate_s": generate_s,
                "score_s": score_s,
                "train_s": train_s,
                "ess": losses.ESS.mean(),
                "clip_fraction": losses.clip_fraction.mean(),
                "kl_approx": losses.kl_approx.mean(),
                "entropy": -torch.cat(server_B_R).mean(),
                "grad_norm": grad_norm,
                "elapsed_s": time.perf_counter() - started,
            }
            rows.append({name: value if isinstance(value, int) else float(value) for name, value in row.items()})
            metrics.writerow({name: f"{value:.6g}" for name, value in rows[-1].items()})
            metrics_file.flush()
            write_samples(samples_file, step, batch_B)
            bar.write(STEP_LINE.format(**rows[-1]))
            bar.update()
            bar.set_postfix_str("generating")
            clock = time.perf_counter()
        bar.set_postfix_str("stopping the server")
    save(model, tokenizer, args.output / "checkpoint")
    return rows


def keep_freed_memory() -> None:
    """Tell glibc not to hand memory back between micro-batches: page faults are nearly half of training on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-2, 2**28)  # M_TOP_PAD: grow in steps of 256 MB


def main() -> None:
    args = read_arguments()
    tensordict.set_list_to_stack(True).set()  # TorchRL's language model parts rely on it
    disable_progress_bar()  # transformers' own
    torch.manual_seed(args.seed)
    keep_freed_memory()
    args.output.mkdir(parents=True, exist_ok=True)
    if (args.output / "metrics.csv").exists():  # what an earlier run left must not pass for this one's
        (args.output / "report.png").unlink(missing_ok=True)
        for name in ("checkpoint", "checkpoint-previous"):
            shutil.rmtree(args.output / name, ignore_errors=True)
    try:
        with tqdm(total=args.steps, unit="step", dynamic_ncols=True) as bar:
            rows = train(args, bar)
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted: the server is stopped; finished steps are in {args.output}/") from None
    draw_report(rows, args.output / "report.png")
    fifth = max(1, len(rows) // 5)
    first, last = (sum(row["reward_mean"] for row in part) / fifth for part in (rows[:fifth], rows[-fifth:]))
    print(
        f"mean reward: first fifth {first:.3f}, last fifth {last:.3f}; "
        f"largest log-prob gap {max(row['logprob_gap_max'] for row in rows):.1e}; "
        f"{rows[-1]['elapsed_s']:.0f} s. Picture, numbers and weights are in {args.output}/"
    )


if __name__ == "__main__":
    main()
