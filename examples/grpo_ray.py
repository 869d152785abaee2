"""GRPO on a Ray cluster: servers as actors on its nodes, rollouts in another, the trainer here.

    python examples/grpo_ray.py                              # a local Ray, two servers on the CPU
    python examples/grpo_ray.py --preset gpu                 # a running cluster: config/grpo_ray/gpu.yaml
    python examples/grpo_ray.py --preset gpu engine.dp_size=8 engine.tp_size=4 train.questions=64
    python examples/grpo_ray.py --resume outputs/grpo_ray    # go on after Ctrl-C, or a crash

Ray sets a bundle aside for each server (a placement group), starts an actor in it, and the actor a server, which
listens on its node's address and ends with the actor. TorchRL's RayLLMCollector runs the environments in an actor of
its own. What is large doesn't go through Ray: the collector asks the servers over HTTP, and the trainer's weights go
to all servers, on whatever nodes, in one broadcast (weight_sync_schemes.policy.config.master_address is this machine
as they see it).

The loop is that of grpo_async.py: rollouts and training side by side, old tokens weighted for their age.

Seen without a GPU, SmolLM2-135M-Instruct and a local Ray, 16 steps of 14 s: the mean reward goes from 0.12 in the
first fifth of the steps to 0.77 in the last, right answers from 14 to 91 %. Tokens are one update old; their mean
log-prob gap is 0.045, the effective sample size 0.979 or more.

Files, in outputs/grpo_ray/: config.yaml, metrics.csv (a line per step), samples.jsonl (a line per answer), report.png
(redrawn as it goes), checkpoints/, and model/ (the last weights, for transformers).
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

# Without a GPU the trainer's threads share their cores with the server: they must sleep, not spin, while they wait for
# each other. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from omegaconf import DictConfig
from torchrl.collectors.llm import RayLLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.envs.transforms import PolicyAgeFilter
from torchrl.objectives.llm import MCAdvantage

from torchrl_sglang import recipes

STEP_LINE = (
    "step {step:3d} | reward {reward_mean:.3f}, right {right_rate:4.0%} | {generate_tokens_per_s:4.0f} tokens/s | "
    "wait {wait_s:.1f} s, train {train_s:.1f} s, sync {sync_s:.2f} s | weights v{weight_version}, age of tokens "
    "{staleness_mean:.2f} (most {staleness_max}) | ESS {ess:.3f}, log-prob gap {logprob_gap_mean:.1e}"
)


def train(config: DictConfig, resume: bool) -> bool:
    settings = recipes.TrainSettings(**config.train)
    tokenizer = recipes.load_tokenizer(config.model)
    model = recipes.load_model(config.model, settings.device)
    with ExitStack() as stack:  # closes everything in reverse order, however this ends
        run = stack.enter_context(recipes.Run(config, {"model": model}, resume=resume))
        run.say("starting the servers")
        serving = stack.enter_context(recipes.RayServing(config, progress=run.say))
        serving.push_first_weights(model, run.checkpoint)

        task = recipes.make_task(config.task)
        collector = RayLLMCollector(
            partial(
                recipes.make_env,
                task,
                tokenizer,
                questions=settings.questions,
                answers=settings.answers,
                seed=settings.seed,
                start=run.position,
            ),
            policy=serving.policy,
            dialog_turns_per_batch=settings.batch_size,
            remote_config=dict(config.ray.collector),
        )
        stack.callback(recipes.end_ray_collector, collector)
        serving.scheme.attach(collector)
        test = config.evaluate

        def evaluation() -> dict[str, float]:
            test_env = recipes.make_test_env(task, tokenizer, questions=test.questions, answers=test.answers)
            policy = serving.policy.get_new_version()  # the other one may be collecting
            return recipes.evaluate(test_env, policy, answers=test.answers, ks=test.ks)

        run.evaluate(0, evaluation)
        rollouts = recipes.BackgroundRollouts(
            collector, ahead=config.rollouts.ahead, timeout_s=config.rollouts.timeout_s
        )
        stack.enter_context(rollouts)
        # compares the answers to one question...
        advantage = MCAdvantage(grpo_size=settings.answers)
        # ...of which those whose oldest token is too old are then left out
        is_fresh = PolicyAgeFilter(
            lambda: serving.weight_version,
            config.rollouts.max_staleness,
            policy_version_key=("generation", "policy_version"),
            strict=True,
        )
        buffer = ReplayBuffer(storage=LazyStackStorage(settings.batch_size), batch_size=settings.micro_batch)
        autocast = torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=settings.autocast == "bfloat16")
        temperature = serving.policy.sampling_params.temperature

        for step in run.steps():
            run.say("waiting for rollouts")
            with run.clock("wait"):
                buffer.empty()
                num_dropped = 0
                while len(buffer) == 0:
                    fresh = is_fresh.inv(advantage.inv(rollouts.take().reshape(-1)))
                    num_dropped += settings.batch_size - len(fresh)
                    if len(fresh) > 0:
                        buffer.extend(fresh)
            batch, version = recipes.Sequences.from_tensordict(buffer[:]).to(run.device), serving.weight_version

            pi_N, entropy_N = torch.empty_like(batch.server_N), torch.empty_like(batch.server_N)
            with run.clock("train"):
                for epoch in range(settings.epochs):
                    for tokens, part in batch.split(settings.micro_batch):
                        run.say(f"training {tokens.stop}/{batch.num_tokens} tokens")
                        with autocast:
                            scores = recipes.score_tokens(model, part, temperature=temperature, entropy=epoch == 0)
                        if epoch == 0:  # no step has been taken on this batch: pi is the policy before the update
                            pi_N[tokens], entropy_N[tokens] = scores.log_probs_N.detach(), scores.entropy_N
                        weight_N = recipes.truncated_importance_weights(
                            pi_N[tokens], part.server_N, cap=config.loss.importance_cap
                        )
                        loss_N = recipes.clipped_policy_loss(
                            scores.log_probs_N, pi_N[tokens], part.advantage_N, clip_epsilon=config.loss.clip_epsilon
                        )
                        # sums over micro-batches, divided by the batch's tokens, add up to the batch's mean
                        ((weight_N * loss_N).sum() / batch.num_tokens).backward()
                    grad_norm = run.optimizer_step()

            run.say("sending the weights")
            with run.clock("sync"):
                collector.update_policy_weights_(model)

            signal = recipes.training_signal(
                trainer_N=pi_N, server_N=batch.server_N, entropy_N=entropy_N, clip_epsilon=config.loss.clip_epsilon
            )
            row = {
                **recipes.batch_numbers(batch, weight_version=version),
                **signal,
                "dropped_answers": num_dropped,
                "generate_tokens_per_s": batch.num_tokens / rollouts.collect_s,
                "collect_s": rollouts.collect_s,  # of this batch, beside the trainer's own work
                "sync_mb": serving.sync_mb,
                "weight_version": serving.weight_version,
                "grad_norm": grad_norm,
            }
            run.log(step, row, line=STEP_LINE)
            run.folder.log_samples(recipes.sample_lines(step, batch, tokenizer))
            run.evaluate(step, evaluation)
            run.save(step, batch, weight_version=serving.weight_version)
        run.say("stopping")
    if not run.stop.requested:
        recipes.save_model(model, tokenizer, Path(config.run.folder) / "model")
    return not run.stop.requested


if __name__ == "__main__":
    recipes.run_program(__file__, train, description=__doc__)
