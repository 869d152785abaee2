"""GRPO with rollouts and training side by side; importance weights correct for tokens of older weights.

    python examples/grpo_async.py                                    # no GPU: SmolLM2-135M-Instruct learns to add
    python examples/grpo_async.py --preset gpu train.lr=2e-6         # two servers, NCCL: config/grpo_async/gpu.yaml
    python examples/grpo_async.py --preset ray_cpu                   # a local Ray, two servers in actors on the CPU
    python examples/grpo_async.py --preset ray_gpu engine.dp_size=8  # a Ray cluster: config/grpo_async/ray_gpu.yaml
    python examples/grpo_async.py engine.url=http://host:30000       # attach to running servers
    python examples/grpo_async.py rollouts.ahead=0                   # synchronous training, for comparison
    python examples/grpo_async.py --resume outputs/grpo_async        # continue after Ctrl-C or a crash

A thread collects the next batch while the trainer trains on the current one. During a weight update the servers
interrupt running requests (pause: retract) and continue them with the new weights, so one answer may hold tokens of
several versions; the version of each token is recorded. Answers older than rollouts.max_staleness updates are dropped.
The others have weight min(pi / mu, loss.importance_cap) per token: pi is the trained model, mu the model that sampled
the token. The loss is not TorchRL's GRPOLoss, which clips the ratio pi / mu itself: it would stop the gradient of every
old token whose ratio has left the clip interval.

With a Ray preset, Ray reserves a bundle per server (a placement group) and starts an actor in it, and the actor starts
the server, which listens on its node's address and ends with the actor. TorchRL's RayLLMCollector runs the environments
in another actor. Prompts, answers and weights do not pass through Ray: the collector queries the servers over HTTP, and
the trainer sends its weights to all servers in one broadcast (weight_sync_schemes.policy.config.master_address is this
machine's address as the servers see it).

Measured without a GPU, SmolLM2-135M-Instruct, 16 steps: the mean reward rises from 0.07 in the first fifth of the steps
to 0.84 in the last (ray_cpu: 0.12 to 0.77). All tokens are one update old, except those of the first step and of the
first step after a resume; the mean log-prob gap is 2e-6 for fresh tokens and 0.02 to 0.08 for old ones, the effective
sample size at least 0.978. On 2 cores it does 1.28 times the steps per minute of rollouts.ahead=0.

Files in outputs/grpo_async/ (outputs/grpo_ray/ with Ray): config.yaml, metrics.csv (a line per step), samples.jsonl (a
line per answer), report.png (redrawn during the run), checkpoints/, and model/ (the last weights, for transformers).
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

# Waiting CPU threads sleep instead of spinning, so that they leave the cores to other processes, such as the server.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # takes effect only before torch is imported

import torch
from omegaconf import DictConfig
from torchrl.collectors import Collector
from torchrl.collectors.llm import RayLLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.envs.transforms import PolicyAgeFilter

from torchrl_sglang import recipes

STEP_LINE = (
    "step {step:3d} | reward {reward_mean:.3f}, right {right_rate:4.0%} | wait {wait_s:.1f} s, train {train_s:.1f} s, "
    "sync {sync_s:.2f} s | weights v{weight_version}, age {staleness_mean:.2f} | ESS {ess:.3f}"
)


def open_collector(stack: ExitStack, config: DictConfig, make_env: partial, serving: recipes.Serving) -> object:
    """Collect in this process, or in a Ray actor if the preset has a node ``ray``; ``stack`` closes the collector."""
    batch_size = config.train.questions * config.train.answers
    if "ray" in config:
        collector = RayLLMCollector(
            make_env,
            policy=serving.policy,
            dialog_turns_per_batch=batch_size,
            remote_config=dict(config.ray.collector),
        )
        stack.callback(recipes.end_ray_collector, collector)
        serving.scheme.attach(collector)
        return collector
    collector = Collector(
        make_env(),
        serving.policy,
        frames_per_batch=batch_size,
        total_frames=-1,
        weight_sync_schemes={"policy": serving.scheme},
        auto_register_policy_transforms=False,
    )
    stack.callback(collector.shutdown)
    return collector


def train(config: DictConfig, resume: bool) -> bool:
    settings = recipes.TrainSettings(**config.train)
    tokenizer = recipes.load_tokenizer(config.model)
    model = recipes.load_model(config.model, settings.device)
    with ExitStack() as stack:  # closes everything in reverse order, also after an error
        run = stack.enter_context(recipes.Run(config, {"model": model}, resume=resume))
        run.say("starting the servers")
        serving_type = recipes.RayServing if "ray" in config else recipes.Serving
        serving = stack.enter_context(serving_type(config, progress=run.say))
        serving.push_first_weights(model, resumed_version=run.resumed_version)

        task = recipes.make_task(config.task)
        make_env = partial(
            recipes.make_env,
            task,
            tokenizer,
            questions=settings.questions,
            answers=settings.answers,
            seed=settings.seed,
            start=run.position,
        )
        collector = open_collector(stack, config, make_env, serving)
        test = config.evaluate

        def evaluation() -> dict[str, float]:
            test_env = recipes.make_test_env(task, tokenizer, questions=test.questions, answers=test.answers)
            policy = serving.policy.get_new_version()  # serving.policy may be in use by the collector
            return recipes.evaluate(test_env, policy, answers=test.answers, ks=test.ks)

        run.evaluate(0, evaluation)
        rollouts = recipes.BackgroundRollouts(
            collector, ahead=config.rollouts.ahead, timeout_s=config.rollouts.timeout_s
        )
        stack.enter_context(rollouts)
        advantage = recipes.GroupAdvantage(grpo_size=settings.answers)  # compares the answers to one question
        is_fresh = PolicyAgeFilter(  # afterwards drops answers whose oldest token is too old
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
                        if epoch == 0:  # not updated on this batch yet: pi is the policy before the update
                            pi_N[tokens], entropy_N[tokens] = scores.log_probs_N.detach(), scores.entropy_N
                        weight_N = recipes.truncated_importance_weights(
                            pi_N[tokens], part.server_N, cap=config.loss.importance_cap
                        )
                        loss_N = recipes.clipped_policy_loss(
                            scores.log_probs_N, pi_N[tokens], part.advantage_N, clip_epsilon=config.loss.clip_epsilon
                        )
                        # the sums of the micro-batches, each divided by the batch's tokens, add up to the batch's mean
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
                "collect_s": rollouts.collect_s,  # of this batch, in the background
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
