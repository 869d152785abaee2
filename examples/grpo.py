"""Train a language model with GRPO: TorchRL learns while a real SGLang server generates. Runs without a GPU.

    make quickstart                                          # or: python examples/grpo.py
    python examples/grpo.py --model Qwen/Qwen3-0.6B          # another chat model, on a machine with two GPUs
    python examples/grpo.py --preset gpu                     # more of everything: examples/config/grpo/gpu.yaml
    python examples/grpo.py evaluate.every=4                 # any setting of the preset
    python examples/grpo.py --resume outputs/quickstart      # go on after Ctrl-C

SmolLM2-135M-Instruct is asked "What is 5 + 2? Answer with only the number." At first it rambles, and about one answer
in ten holds the sum. After every step the trainer's weights replace the server's over the network, and the next
answers come from the new model.

Expected on 2 CPU cores, in 6 to 7 minutes: the mean reward goes from 0.13 in the first fifth of the 16 steps to 0.84 in
the last (the answers settle on "5 + 2 = 7"), server and trainer agree on every sampled token's log-prob to 1e-4, 538 MB
of weights reach the server in about a second, and its weight version goes up by one per step.

Files, in outputs/quickstart/: config.yaml, metrics.csv (a line per step), samples.jsonl (a line per answer), report.png
(redrawn as it goes), checkpoint/ (the last weights), checkpoint-previous/ (those before the last step, which gave the
last answers) and checkpoints/ (to resume from).
"""

from __future__ import annotations

import argparse
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from omegaconf import DictConfig
from torchrl.collectors import Collector
from torchrl.data import LazyStackStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage

from torchrl_sglang import recipes

STEP_LINE = (
    "step {step:3d} | reward {reward_mean:.3f}, right {right_rate:4.0%} | {response_tokens_mean:4.1f} tokens/answer, "
    "{generate_tokens_per_s:3.0f} tokens/s | generate {generate_s:.1f} s, train {train_s:.1f} s, sync {sync_s:.2f} s "
    "{sync_mb:.0f} MB | weights v{weight_version} | log-prob gap {logprob_gap_max:.1e}"
)
# words of the command line that are short for settings
SHORT_FOR = {
    "model": ("model",),
    "steps": ("train.steps",),
    "questions": ("train.questions",),
    "answers": ("train.answers",),
    "micro_batch": ("train.micro_batch",),
    "max_new_tokens": ("policy.generate_kwargs.max_new_tokens",),
    "lr": ("train.lr",),
    "device": ("train.device", "engine.device"),
    "dtype": ("train.autocast", "engine.dtype"),
    "seed": ("train.seed",),
    "output": ("run.folder",),
}


def read_arguments() -> recipes.Arguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes.add_arguments(parser, recipes.presets_of(__file__))
    parser.add_argument("--model", help="path or hub name of a chat model (default: SmolLM2-135M-Instruct, cached)")
    parser.add_argument("--steps", type=int, help="collect, train, sync: one step (default 16)")
    parser.add_argument("--questions", type=int, help="questions per step (default 4)")
    parser.add_argument("--answers", type=int, help="answers per question, the group of GRPO (default 8)")
    parser.add_argument("--micro-batch", type=int, help="answers per forward and backward pass (default 8)")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default 12)")
    parser.add_argument("--lr", type=float, help="learning rate of AdamW (default 1e-5)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda with two GPUs or more, else cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="server's, and autocast's (default: bfloat16 on GPUs)"
    )
    parser.add_argument("--seed", type=int, help="of questions and answers (default 0)")
    parser.add_argument("--output", help="folder for all files (default outputs/quickstart)")
    args = parser.parse_args()
    for name in ("steps", "questions", "micro_batch", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.model and args.output and Path(args.output).resolve() in Path(args.model).resolve().parents:
        parser.error("--model lies in --output, whose files are replaced: choose another --output")
    if args.answers is not None and args.answers < 2:
        parser.error("--answers must be at least 2: GRPO compares the answers to one question with each other")
    if args.device is None and args.preset == "cpu" and args.resume is None and torch.cuda.device_count() >= 2:
        args.device, args.dtype = "cuda", args.dtype or "bfloat16"  # SGLang's attention on GPUs is for half precision
    for name, settings in SHORT_FOR.items():
        if getattr(args, name) is not None:
            args.overrides += [recipes.override(setting, getattr(args, name)) for setting in settings]
    return recipes.read_arguments(args)


def train(config: DictConfig, resume: bool) -> bool:
    settings, output = recipes.TrainSettings(**config.train), Path(config.run.folder)
    if not resume:  # what an earlier run left must not pass for this one's
        for name in ("checkpoint", "checkpoint-previous"):
            shutil.rmtree(output / name, ignore_errors=True)
    started = time.perf_counter()
    tokenizer = recipes.load_tokenizer(config.model)
    model = recipes.load_model(config.model, settings.device)
    actor = TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=False)
    loss_module = GRPOLoss(actor, entropy_bonus=False)
    buffer = ReplayBuffer(
        storage=LazyStackStorage(settings.batch_size),
        sampler=SamplerWithoutReplacement(),
        batch_size=settings.micro_batch,
        transform=MCAdvantage(grpo_size=settings.answers),
    )
    task = recipes.make_task(config.task)
    with ExitStack() as stack:  # closes everything in reverse order, however this ends
        run = stack.enter_context(recipes.Run(config, {"model": model}, resume=resume))
        run.say("starting the server")
        serving = stack.enter_context(recipes.Serving(config, progress=run.say))
        serving.push_first_weights(model, run.checkpoint)
        test = config.evaluate

        def evaluation() -> dict[str, float]:
            test_env = recipes.make_test_env(task, tokenizer, questions=test.questions, answers=test.answers)
            return recipes.evaluate(test_env, serving.policy, answers=test.answers, ks=test.ks)

        run.evaluate(0, evaluation)
        collector = Collector(
            recipes.make_env(
                task,
                tokenizer,
                questions=settings.questions,
                answers=settings.answers,
                seed=settings.seed,
                start=run.position,
            ),
            serving.policy,
            frames_per_batch=settings.batch_size,
            total_frames=-1,
            weight_sync_schemes={"policy": serving.scheme},
            auto_register_policy_transforms=False,
        )
        stack.callback(collector.shutdown)
        rollouts = iter(collector)
        autocast = torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=settings.autocast == "bfloat16")

        for step in run.steps():
            run.say("generating")
            with run.clock("generate"):
                batch_B = next(rollouts).reshape(-1).to(run.device)
            answers = recipes.Sequences.from_tensordict(batch_B)
            if step == settings.steps:
                recipes.save_model(model, tokenizer, output / "checkpoint-previous")

            run.say("scoring with the trainer's model")
            with run.clock("score"), autocast:
                trainer_N = recipes.score_in_parts(model, answers, micro_batch=settings.micro_batch)

            with run.clock("train"):
                buffer.empty()
                # MCAdvantage compares the answers to one question and writes "advantage".
                keys = ("query", "tokens", "masks", "log_probs", ("next", "reward"), ("next", "done"))
                buffer.extend(batch_B.select(*keys))
                seen, parts = 0, []
                for micro_B in buffer:
                    with autocast:
                        loss = loss_module(micro_B)
                    # A micro-batch's loss is the mean over its tokens; weighted like this, they add up to the batch's.
                    num_tokens = sum(map(len, micro_B.get(("tokens", "response"), as_list=True)))
                    (loss.loss_objective * num_tokens / answers.num_tokens).backward()
                    parts.append(loss.detach())
                    seen += len(micro_B)
                    run.say(f"training {seen}/{settings.batch_size}")
                grad_norm = run.optimizer_step()

            run.say("sending the weights")
            version = serving.weight_version
            with run.clock("sync"):
                collector.update_policy_weights_(actor)

            generate_s = run.clock.seconds("generate")
            row = {
                **recipes.batch_numbers(answers, weight_version=version),
                "generate_tokens_per_s": answers.num_tokens / generate_s,
                "sync_mb": serving.sync_mb,
                "weight_version": serving.weight_version,
                **recipes.training_signal(trainer_N=trainer_N, server_N=answers.server_N, clip_epsilon=0.2),
                "kl_approx": torch.stack(parts).kl_approx.mean(),
                "entropy": -answers.server_N.mean(),  # estimated from the sampled tokens, in nats
                "grad_norm": grad_norm,
                "elapsed_s": time.perf_counter() - started,
            }
            run.log(step, row, line=STEP_LINE)
            run.folder.log_samples(recipes.sample_lines(step, answers, tokenizer))
            run.evaluate(step, evaluation)
            run.save(step, answers, weight_version=serving.weight_version)
        run.say("stopping the server")
    if run.stop.requested:
        return False
    recipes.save_model(model, tokenizer, output / "checkpoint")
    rows = run.folder.metrics.rows
    fifth = max(1, len(rows) // 5)
    first, last = (sum(row["reward_mean"] for row in part) / fifth for part in (rows[:fifth], rows[-fifth:]))
    print(
        f"mean reward: first fifth {first:.3f}, last fifth {last:.3f}; "
        f"largest log-prob gap {max(row['logprob_gap_max'] for row in rows):.1e}; "
        f"{rows[-1]['elapsed_s']:.0f} s. Picture, numbers and weights are in {output}/"
    )
    return True


if __name__ == "__main__":
    recipes.run_program(__file__, train, arguments=read_arguments())
