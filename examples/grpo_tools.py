"""GRPO over several turns: the model writes Python, reads the program's output, and answers.

    python examples/grpo_tools.py                            # no GPU: SmolLM2-135M-Instruct, sums of three digits
    python examples/grpo_tools.py --preset gpu task.largest=999999999     # config/grpo_tools/gpu.yaml
    python examples/grpo_tools.py --resume outputs/grpo_tools             # continue after Ctrl-C or a crash

"Write a Python code block that prints 716 + 796." A program in the answer is run, and its output is the next message;
an answer without a program ends the conversation and is scored. Programs run in processes with limits, which are not a
sandbox: see recipes.run_python.

The tokens of a turn's prompt begin with all tokens of the turn before, and no text is tokenized twice. So a
conversation is one sequence, the servers find its beginning in their prefix cache, and the trainer needs one forward
pass for it. Only tokens that the model sampled are trained on, with the advantage of the whole conversation.

Each slot of the environment starts its next conversation when one ends. Conversations in progress at a weight update
continue afterwards, so a conversation may hold tokens of several versions, each with weight
min(pi / mu, loss.importance_cap) as in grpo_async.py. TorchRL's GRPOLoss is not used because it has no such weight.

Measured without a GPU, SmolLM2-135M-Instruct, 16 steps of about a minute: answers with a program rise from 31 to 100 %,
right answers from 5 % in the first fifth of the steps to 82 % in the last, the mean reward from 0.13 to 0.85. Server
and trainer agree to 2e-5 on fresh tokens; the effective sample size of older tokens is at least 0.994.

Files in outputs/grpo_tools/: config.yaml, metrics.csv (a line per step), samples.jsonl (a line per conversation),
report.png, checkpoints/, and model/ (the last weights, for transformers).
"""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from pathlib import Path

# Waiting CPU threads sleep instead of spinning, so that they leave the cores to other processes, such as the server.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # takes effect only before torch is imported

import torch
from omegaconf import DictConfig, OmegaConf
from torchrl.collectors.llm import LLMCollector

from torchrl_sglang import recipes

STEP_LINE = (
    "step {step:3d} | reward {reward_mean:.3f}, right {right_rate:4.0%}, programs {program_rate:4.0%} | "
    "generate {generate_s:.1f} s, train {train_s:.1f} s | weights v{weight_version}, age {staleness_mean:.2f} | "
    "ESS {ess:.3f}"
)

# LLMCollector's constructor warns about settings that it makes itself.
warnings.filterwarnings("ignore", module="torchrl.collectors")


def train(config: DictConfig, resume: bool) -> bool:
    settings = recipes.TrainSettings(**config.train)
    tokenizer = recipes.load_tokenizer(config.model)
    model = recipes.load_model(config.model, settings.device)
    with ExitStack() as stack:  # closes everything in reverse order, also after an error
        run = stack.enter_context(recipes.Run(config, {"model": model}, resume=resume))
        run.say("starting the servers")
        serving = stack.enter_context(recipes.Serving(config, progress=run.say))
        serving.push_first_weights(model, resumed_version=run.resumed_version)

        task = recipes.make_task(config.task)

        def make_env(questions: int, answers: int, seed: int | None, start: int = 0) -> object:
            tool = recipes.PythonTool(task.score, **OmegaConf.to_container(config.tool))
            return recipes.make_tool_env(
                task, tokenizer, tool, questions=questions, answers=answers, seed=seed, start=start
            )

        collector = LLMCollector(
            make_env(settings.questions, settings.answers, settings.seed, run.position),
            policy=serving.policy,
            dialog_turns_per_batch=settings.answers,
            yield_completed_trajectories=True,
        )
        stack.callback(collector.shutdown)
        serving.scheme.attach(collector)

        def evaluation() -> dict[str, float]:
            test = config.evaluate
            questions = min(test.questions, len(task.held_out))
            return recipes.evaluate_with_tool(
                make_env(questions, test.answers, seed=None),
                serving.policy.get_new_version(),
                max_turns=config.tool.max_turns,
                answers=test.answers,
                ks=test.ks,
            )

        run.evaluate(0, evaluation)
        rollouts = iter(collector)
        # returns a question's conversations when all of them are complete
        groups = recipes.GroupAdvantage(grpo_size=settings.answers, prompt_key="position", trajectory_return="sum")
        autocast = torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=settings.autocast == "bfloat16")
        temperature = serving.policy.sampling_params.temperature

        for step in run.steps():
            run.say("generating")
            with run.clock("generate"):
                turns, num_done = [], 0
                while num_done < settings.batch_size:
                    complete = groups.inv(next(rollouts))
                    if complete is not None:
                        turns += complete.unbind(0)
                        num_done += int(complete["next", "done"].sum())
                        run.say(f"generating {num_done}/{settings.batch_size}")
            batch, version = recipes.Conversations.from_turns(turns).to(run.device), serving.weight_version
            answers, written_N = batch.tokens, batch.written_N

            pi_N, entropy_N = torch.empty_like(answers.server_N), torch.empty_like(answers.server_N)
            with run.clock("train"):
                for epoch in range(settings.epochs):
                    for tokens, part in batch.split(settings.micro_batch):
                        run.say(f"training {tokens.stop}/{answers.num_tokens} tokens")
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
                        # only tokens that the assistant sampled, without those of prompts and tools
                        sampled_N = written_N[tokens]
                        ((weight_N * loss_N)[sampled_N].sum() / batch.num_written).backward()
                    grad_norm = run.optimizer_step()

            run.say("sending the weights")
            with run.clock("sync"):
                collector.update_policy_weights_(model)

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
                "program_rate": float((batch.turns_B > 1).float().mean()),
                "generate_tokens_per_s": batch.num_written / run.clock.seconds("generate"),
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
