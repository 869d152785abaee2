"""PPO: a critic instead of groups, and a penalty for the KL to a reference model on a second SGLang server.

    python examples/ppo.py                                            # no GPU: SmolLM2-135M-Instruct learns to add
    python examples/ppo.py --preset gpu                               # config/ppo/gpu.yaml
    python examples/ppo.py reference.kind=copy                        # the reference without a second server
    python examples/ppo.py engine.url=http://a:30000 reference_engine.url=http://b:30000
    python examples/ppo.py --resume outputs/ppo                       # continue after Ctrl-C or a crash

The trainer sends its weights to one server after every step; the other server keeps the initial weights and computes
the reference log-prob of every sampled token. A token's reward is -ppo.kl_coef * (log pi - log reference), plus the
answer's reward at the last token. The critic is a linear head on the policy's hidden states or a separate model
(critic.kind); advantages are TorchRL's GAE. PPO's clipped losses pass train.epochs times over every batch. They are
functions of one forward pass: TorchRL's ClipPPOLoss calls actor and critic separately and would compute their shared
trunk twice.

Measured without a GPU, SmolLM2-135M-Instruct, 16 steps of 40 s: the mean reward rises from 0.17 in the first fifth of
the steps to 0.71 in the last, right answers from 22 to 98 %, the KL to the reference to 0.3 nats per token; server and
trainer agree on every sampled token's log-prob to 4e-5.

Files in outputs/ppo/: config.yaml, metrics.csv (a line per step), samples.jsonl (a line per answer), report.png
(redrawn during the run), checkpoints/ (policy and critic), and model/ (the last policy, for transformers).
"""

from __future__ import annotations

import copy
import os
from contextlib import ExitStack
from pathlib import Path

# Waiting CPU threads sleep instead of spinning, so that they leave the cores to other processes, such as the server.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # takes effect only before torch is imported

import torch
from omegaconf import DictConfig
from torchrl.collectors import Collector

from torchrl_sglang import recipes

STEP_LINE = (
    "step {step:3d} | reward {reward_mean:.3f}, right {right_rate:4.0%} | generate {generate_s:.1f} s, "
    "train {train_s:.1f} s, sync {sync_s:.2f} s | weights v{weight_version} | KL {kl_reference_k3:.3f}, "
    "R2 {explained_variance:.2f}"
)


def train(config: DictConfig, resume: bool) -> bool:
    settings, ppo = recipes.TrainSettings(**config.train), config.ppo
    tokenizer = recipes.load_tokenizer(config.model)
    model = recipes.load_model(config.model, settings.device)
    trunk = copy.deepcopy(model.base_model) if config.critic.kind == "separate" else None
    critic = recipes.Critic(model.config.hidden_size, trunk).to(model.device)
    with ExitStack() as stack:  # closes everything in reverse order, also after an error
        run = recipes.Run(
            config, {"model": model, "critic": critic}, resume=resume, learning_rates={"critic": config.critic.lr}
        )
        stack.enter_context(run)
        run.say("starting the servers")
        serving = stack.enter_context(recipes.Serving(config, progress=run.say))
        reference = recipes.make_reference(config, serving.servers, micro_batch=settings.micro_batch, progress=run.say)
        serving.push_first_weights(model, resumed_version=run.resumed_version)

        task = recipes.make_task(config.task)
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
        temperature = serving.policy.sampling_params.temperature

        for step in run.steps():
            run.say("generating")
            with run.clock("generate"):
                batch = recipes.Sequences.from_tensordict(next(rollouts)).to(run.device)
            version, lengths_B = serving.weight_version, batch.lengths_B

            # scores of policy, critic and reference before the update
            run.say("scoring")
            old_N, entropy_N, values_N = (torch.empty_like(batch.server_N) for _ in range(3))
            with run.clock("score"):
                reference_N = reference(batch)
                for tokens, part in batch.split(settings.micro_batch):
                    with torch.no_grad(), autocast:
                        scores = recipes.score_tokens(
                            model, part, temperature=temperature, entropy=True, hidden=critic.wants_hidden
                        )
                        values_N[tokens] = critic(part, scores)
                    old_N[tokens], entropy_N[tokens] = scores.log_probs_N, scores.entropy_N

            rewards_N = recipes.token_rewards(batch.reward_B, ppo.kl_coef * (old_N - reference_N), lengths_B)
            advantage_N, returns_N = recipes.token_advantages(
                rewards_N, values_N, lengths_B, gamma=ppo.gamma, lam=ppo.lam
            )
            batch = batch.with_advantage(recipes.whiten(advantage_N))
            weight_N = recipes.truncated_importance_weights(old_N, batch.server_N, cap=ppo.importance_cap)

            new_N = torch.empty_like(old_N)
            with run.clock("train"):
                for epoch in range(settings.epochs):
                    for tokens, part in batch.split(settings.micro_batch):
                        run.say(f"training {tokens.stop}/{batch.num_tokens} tokens, epoch {epoch + 1}")
                        with autocast:
                            scores = recipes.score_tokens(
                                model, part, temperature=temperature, hidden=critic.wants_hidden
                            )
                            value_N = critic(part, scores)
                        new_N[tokens] = scores.log_probs_N.detach()
                        policy_loss_N = recipes.clipped_policy_loss(
                            scores.log_probs_N, old_N[tokens], part.advantage_N, clip_epsilon=ppo.clip_epsilon
                        )
                        value_loss_N = recipes.clipped_value_loss(
                            value_N, values_N[tokens], returns_N[tokens], clip_epsilon=ppo.value_clip_epsilon
                        )
                        loss_N = weight_N[tokens] * policy_loss_N + ppo.value_coef * value_loss_N
                        (loss_N.sum() / batch.num_tokens).backward()
                    grad_norm = run.optimizer_step()

            run.say("sending the weights")
            with run.clock("sync"):
                collector.update_policy_weights_(model)

            signal = recipes.training_signal(
                trainer_N=old_N,
                server_N=batch.server_N,
                reference_N=reference_N,
                entropy_N=entropy_N,
                clip_epsilon=ppo.clip_epsilon,
            )
            moved_N = (new_N - old_N).exp()
            row = {
                **recipes.batch_numbers(batch, weight_version=version),
                **signal,
                "generate_tokens_per_s": batch.num_tokens / run.clock.seconds("generate"),
                "sync_mb": serving.sync_mb,
                "weight_version": serving.weight_version,
                # of the ratio new / old in the last epoch, which the loss clips
                "update_clip_fraction": ((moved_N - 1).abs() > ppo.clip_epsilon).float().mean(),
                "explained_variance": 1 - (returns_N - values_N).var() / returns_N.var().clamp(min=1e-8),
                "value_mean": values_N.mean(),
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
