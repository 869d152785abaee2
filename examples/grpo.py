"""Train a language model with GRPO: TorchRL learns while a real SGLang server generates. Runs without a GPU.

    make quickstart                                          # or: python examples/grpo.py
    python examples/grpo.py train.steps=32 train.lr=5e-6     # any setting of examples/config/grpo/cpu.yaml
    python examples/grpo.py model=Qwen/Qwen3-0.6B            # another chat model
    python examples/grpo.py --preset one-gpu                 # the same on one GPU, which server and trainer share
    python examples/grpo.py --preset two_gpus                # the same on two GPUs: one serves, one trains
    python examples/grpo.py --preset gpu                     # three GPUs, a larger model and task
    python examples/grpo.py evaluate.every=4                 # pass@k on held-out questions
    python examples/grpo.py --resume outputs/quickstart      # continue after Ctrl-C
    python examples/grpo.py --overwrite                      # once more, in place of the run in outputs/quickstart

SmolLM2-135M-Instruct is asked "What is 5 + 2? Answer with only the number." At first its answers are long, and about
one in ten contains the sum. After every step the trainer sends its weights to the server over the network, and the new
model generates the next answers. The loss is TorchRL's GRPOLoss.

Expected on 2 CPU cores, in 4 to 5 minutes: the mean reward rises from 0.13 in the first fifth of the 16 steps to 0.84
in the last (the answers become "5 + 2 = 7"), server and trainer agree on every sampled token's log-prob to 1e-4, 538 MB
of weights reach the server in about a second, and its weight version rises by one per step.

Files in outputs/quickstart/: config.yaml, metrics.csv (a line per step), samples.jsonl (a line per answer),
samples.html (answers before and after training), report.png (redrawn during the run), checkpoint/ (the last weights,
0.5 GB) and checkpoints/ (to resume from, 1.6 GB).
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

# Waiting CPU threads sleep instead of spinning, so that they leave the cores to other processes, such as the server.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # takes effect only before torch is imported

import torch
from omegaconf import DictConfig
from torchrl.collectors import Collector
from torchrl.data import LazyStackStorage, ReplayBuffer, SamplerWithoutReplacement

from torchrl_sglang import recipes

STEP_LINE = (
    "step {step:3d} | reward {reward_mean:.3f}, right {right_rate:4.0%} | generate {generate_s:.1f} s, "
    "train {train_s:.1f} s, sync {sync_s:.2f} s | weights v{weight_version} | log-prob gap {logprob_gap_max:.1e}"
)


def train(config: DictConfig, resume: bool) -> bool:
    settings, output = recipes.TrainSettings(**config.train), Path(config.run.folder)
    started = time.perf_counter()
    tokenizer = recipes.load_tokenizer(config.model)
    model = recipes.load_model(config.model, settings.device)
    buffer = ReplayBuffer(
        storage=LazyStackStorage(settings.batch_size),
        sampler=SamplerWithoutReplacement(),
        batch_size=settings.micro_batch,
        transform=recipes.GroupAdvantage(grpo_size=settings.answers),
    )
    task = recipes.make_task(config.task)
    with ExitStack() as stack:  # closes everything in reverse order, also after an error
        run = stack.enter_context(recipes.Run(config, {"model": model}, resume=resume))
        run.say("starting the server")
        serving = stack.enter_context(recipes.Serving(config, progress=run.say))
        serving.push_first_weights(model, resumed_version=run.resumed_version)
        actor = recipes.GRPOActor(model, temperature=serving.policy.sampling_params.temperature)
        loss_module = recipes.make_grpo_loss(actor, clip_epsilon=0.2)
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
            if step == settings.steps and config.checkpoint.get("previous"):
                recipes.save_model(model, tokenizer, output / "checkpoint-previous")

            with run.clock("train"), serving.offloaded(config.get("offload_servers", False)):
                buffer.empty()
                buffer.extend(batch_B)  # GroupAdvantage compares the answers to one question and writes "advantage"
                losses, trainer_parts, server_parts = [], [], []
                for epoch in range(settings.epochs):
                    for number, micro_B in enumerate(buffer, 1):
                        run.say(f"training {min(number * settings.micro_batch, len(answers))}/{len(answers)}")
                        with autocast:
                            loss = loss_module(micro_B)
                        micro_server = micro_B.get(("log_probs", "response"), as_list=True)
                        # A micro-batch's loss is the mean over its tokens; weighted by its share of the batch's tokens,
                        # the micro-batches add up to the batch's mean.
                        (loss.loss_objective * sum(map(len, micro_server)) / answers.num_tokens).backward()
                        if epoch == 0:  # the model before the update, for the metrics
                            losses.append(loss.detach())
                            trainer_parts.append(actor.scores.log_probs_N)
                            server_parts += micro_server
                    grad_norm = run.optimizer_step()

            run.say("sending the weights")
            version = serving.weight_version
            with run.clock("sync"):
                collector.update_policy_weights_(model)

            row = {
                **recipes.batch_numbers(answers, weight_version=version),
                "generate_tokens_per_s": answers.num_tokens / run.clock.seconds("generate"),
                "sync_mb": serving.sync_mb,
                "weight_version": serving.weight_version,
                **recipes.training_signal(
                    trainer_N=torch.cat(trainer_parts), server_N=torch.cat(server_parts), clip_epsilon=0.2
                ),
                "kl_approx": torch.stack(losses).kl_approx.mean(),
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
        f"{rows[-1]['elapsed_s']:.0f} s. Report, metrics and weights are in {output}/"
    )
    return True


if __name__ == "__main__":
    recipes.run_program(__file__, train, description=__doc__)
