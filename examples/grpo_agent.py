"""GRPO with an agent that you already have: any program with an OpenAI client. Here agents/calculator_agent.py.

    python examples/grpo_agent.py                           # no GPU: SmolLM2-135M-Instruct, sums of three digits
    python examples/grpo_agent.py --preset gpu              # config/grpo_agent/gpu.yaml
    python examples/grpo_agent.py collect.ahead=1           # agents run while the trainer trains
    python examples/grpo_agent.py 'agent.command="python examples/agents/calculator_agent.py {task}"'
    python examples/grpo_agent.py --resume outputs/grpo_agent

The agent is not changed for training. It gets an address and a key, as it would from OpenAI; there a gateway in this
process passes its requests on to the SGLang servers as token ids, and records every token with its log-prob and the
weights that sampled it. AgentCollector runs the agent several times on each task and yields complete groups; runs that
fail are reported and their group is replaced. With agent.command the agent is a program of its own, in any language.

Only tokens that the model sampled are trained on, with the advantage of the whole run and the weight
min(pi / mu, loss.importance_cap), as in grpo_tools.py: with collect.ahead a run may hold tokens of several versions.

Files in outputs/grpo_agent/: config.yaml, metrics.csv (a line per step), samples.jsonl (a line per trajectory),
report.png, checkpoints/, and model/ (the last weights, for transformers).
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Waiting CPU threads sleep instead of spinning, so that they leave the cores to other processes, such as the server.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # takes effect only before torch is imported

import torch
from omegaconf import DictConfig, OmegaConf

from torchrl_sglang import AgentCollector, AgentGateway, SessionSettings, group_advantages, recipes

STEP_LINE = (
    "step {step:3d} | reward {reward_mean:.3f}, right {right_rate:4.0%}, turns {turns_mean:.2f} | "
    "wait {wait_s:.1f} s, train {train_s:.1f} s | weights v{weight_version}, age {staleness_mean:.2f} | ESS {ess:.3f}"
)


def load_agent(config: DictConfig) -> Any:
    """The agent: a command line, or the function ``run_agent`` of a file."""
    if config.command is not None:
        return config.command
    path = Path(__file__).parent / config.file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run_agent


def train(config: DictConfig, resume: bool) -> bool:
    settings = recipes.TrainSettings(**config.train)
    tokenizer = recipes.load_tokenizer(config.model)
    model = recipes.load_model(config.model, settings.device)
    with ExitStack() as stack:  # closes everything in reverse order, also after an error
        run = stack.enter_context(recipes.Run(config, {"model": model}, resume=resume))
        run.say("starting the servers")
        serving = stack.enter_context(recipes.Serving(config, progress=run.say))
        serving.push_first_weights(model, resumed_version=run.resumed_version)
        # what an agent does not ask for itself
        sessions = SessionSettings(generation=OmegaConf.to_container(config.gateway.generation))
        gateway = stack.enter_context(AgentGateway(serving.servers, tokenizer=tokenizer, settings=sessions))

        task = recipes.make_task(config.task)
        agent = load_agent(config.agent)
        collector = AgentCollector(
            gateway,
            agent,
            recipes.QuestionStream(task.train, seed=settings.seed, start=run.position),
            group_size=settings.answers,
            groups_per_batch=settings.questions,
            weight_sync_schemes={"policy": serving.scheme},
            **config.collect,
        )
        stack.callback(collector.shutdown)
        test = config.evaluate

        def evaluation() -> dict[str, float]:
            tasks = [{"query": one.query, "answer": one.answer} for one in task.held_out[: test.questions]]
            with AgentCollector(gateway, agent, tasks, group_size=test.answers, skip_equal=False) as tester:
                batches = [recipes.Conversations.from_trajectories(batch).tokens for batch in tester]
            rewards, right = (torch.cat([getattr(each, name) for each in batches]) for name in ("reward_B", "right_B"))
            return {"eval_reward_mean": float(rewards.mean()), "eval_right_rate": float(right.float().mean())}

        run.evaluate(0, evaluation)
        rollouts = iter(collector)
        autocast = torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=settings.autocast == "bfloat16")

        for step in run.steps():
            run.say("waiting for agents")
            with run.clock("wait"):
                rollout = group_advantages(next(rollouts))
            batch, version = recipes.Conversations.from_trajectories(rollout).to(run.device), serving.weight_version
            answers, written_N = batch.tokens, batch.written_N

            pi_N, entropy_N = torch.empty_like(answers.server_N), torch.empty_like(answers.server_N)
            with run.clock("train"):
                for epoch in range(settings.epochs):
                    for tokens, part in batch.split(settings.micro_batch):
                        run.say(f"training {tokens.stop}/{answers.num_tokens} tokens")
                        with autocast:
                            scores = recipes.score_tokens(
                                model, part, temperature=config.gateway.generation.temperature, entropy=epoch == 0
                            )
                        if epoch == 0:  # not updated on this batch yet: pi is the policy before the update
                            pi_N[tokens], entropy_N[tokens] = scores.log_probs_N.detach(), scores.entropy_N
                        weight_N = recipes.truncated_importance_weights(
                            pi_N[tokens], part.server_N, cap=config.loss.importance_cap
                        )
                        loss_N = recipes.clipped_policy_loss(
                            scores.log_probs_N, pi_N[tokens], part.advantage_N, clip_epsilon=config.loss.clip_epsilon
                        )
                        # only tokens that the model sampled, without those of messages and tools
                        sampled_N = written_N[tokens]
                        ((weight_N * loss_N)[sampled_N].sum() / batch.num_written).backward()
                    grad_norm = run.optimizer_step()

            run.say("sending the weights")
            with run.clock("sync"):
                collector.update_policy_weights_(model)

            counts = collector.stats()
            row = {
                **recipes.batch_numbers(answers, weight_version=version),
                **recipes.training_signal(
                    trainer_N=pi_N[written_N],
                    server_N=answers.server_N[written_N],
                    entropy_N=entropy_N[written_N],
                    clip_epsilon=config.loss.clip_epsilon,
                ),
                "response_tokens_mean": batch.num_written / len(batch),
                "turns_mean": float(batch.turns_B.float().mean()),
                "failed_runs": counts["failed_runs"],
                "skipped_groups": counts["skipped_groups"],
                "generate_tokens_per_s": batch.num_written / run.clock.seconds("wait"),
                "sync_mb": serving.sync_mb,
                "weight_version": serving.weight_version,
                "grad_norm": grad_norm,
            }
            run.log(step, row, line=STEP_LINE)
            run.folder.log_samples(recipes.sample_lines(step, answers, tokenizer))
            run.evaluate(step, evaluation)
            run.save(step, answers, weight_version=serving.weight_version)
        run.say("stopping")
    if not run.stop.requested:
        recipes.save_model(model, tokenizer, Path(config.run.folder) / "model")
    return not run.stop.requested


if __name__ == "__main__":
    recipes.run_program(__file__, train, description=__doc__)
