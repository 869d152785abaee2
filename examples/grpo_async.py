"""GRPO whose generation never waits: rollouts and training run side by side, and old tokens are weighted for their age.

    python examples/grpo_async.py                                    # no GPU: SmolLM2-135M-Instruct learns to add
    python examples/grpo_async.py --preset gpu train.lr=2e-6         # two servers, NCCL: config/grpo_async/gpu.yaml
    python examples/grpo_async.py engine.url=http://host:30000       # servers that run already
    python examples/grpo_async.py rollouts.ahead=0                   # the same, synchronous: to compare
    python examples/grpo_async.py --resume outputs/grpo_async        # go on after Ctrl-C, or a crash

A thread collects the next batch while this one is trained on. When the weights are updated, the servers put requests
in flight aside (pause: retract) and go on with them under the new weights, so one answer may hold tokens of several
versions; each knows its own. Answers older than rollouts.max_staleness updates are not trained on. The others count
with weight min(pi / mu, loss.importance_cap) per token: pi is the model being trained, mu what sampled the token.

Files, in outputs/grpo_async/: config.yaml, metrics.csv (a line per step), samples.jsonl (a line per answer), report.png
(redrawn as it goes), checkpoints/, and model/ (the last weights, for transformers).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import tensordict
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torchrl.collectors import Collector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.envs.transforms import Compose, PolicyAgeFilter
from torchrl.objectives.llm import MCAdvantage
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from torchrl_sglang import SGLangError, hydra_configs, recipes

RECIPE = Path(__file__)
STEP_LINE = (
    "step {step:3d} | reward {reward_mean:.3f}, right {right_rate:4.0%} | {generate_tokens_per_s:4.0f} tokens/s | "
    "waited {wait_s:.1f} s, train {train_s:.1f} s, sync {sync_s:.2f} s | weights v{weight_version}, "
    "age of tokens {staleness_mean:.2f} (most {staleness_max}) | ESS {ess:.3f}, log-prob gap {logprob_gap_mean:.1e}"
)


def train(config: DictConfig, resume: bool) -> None:
    settings, path = config.train, str(config.model)
    batch_size, device = settings.questions * settings.answers, recipes.trainer_device(settings.device)
    folder = Path(config.run.folder)
    with ExitStack() as stack:  # closes everything in reverse order, however this ends
        bar = stack.enter_context(tqdm(total=settings.steps, unit="step", dynamic_ncols=True))
        stop = stack.enter_context(recipes.StopRequest(lambda: bar.write("stopping after this step")))
        bar.set_postfix_str("loading the model")
        torch.manual_seed(settings.seed)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # float32 whatever it computes in: steps of 1e-6 would vanish in bfloat16; eval(): no dropout, ever
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
        optimizer, scheduler = recipes.make_optimizer(model.parameters(), settings)
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.autocast == "bfloat16")

        checkpoint = recipes.Checkpoints(folder / "checkpoints").latest() if resume else None
        if checkpoint is not None:
            checkpoint.restore({"model": model}, optimizer, scheduler)
        last_step = 0 if checkpoint is None else checkpoint.step
        position = 0 if checkpoint is None else checkpoint.data_position
        run = recipes.RunFolder(
            folder,
            config,
            resume_step=last_step if resume else None,
            keep_checkpoints=config.checkpoint.keep,
            loggers=config.run.loggers,
            draw=recipes.draw_report,
            draw_every_s=config.run.report_every_s,
        )
        stack.enter_context(run)
        bar.update(last_step)

        # servers, policy and scheme come from YAML, and share one engine
        stack.callback(hydra_configs.close_engines)
        servers = instantiate(config.engine, progress=bar.set_postfix_str)
        policy = instantiate(config.policy)
        scheme = instantiate(config.weight_sync_schemes.policy)
        stack.callback(scheme.shutdown)
        recipes.push_first_weights(scheme, model, checkpoint, launched=bool(servers.servers))
        temperature = policy.sampling_params.temperature

        task = recipes.make_task(config.task)
        env = recipes.make_env(
            task,
            tokenizer,
            questions=settings.questions,
            answers=settings.answers,
            seed=settings.seed,
            start=position,
        )
        collector = Collector(
            env,
            policy,
            frames_per_batch=batch_size,
            total_frames=-1,
            weight_sync_schemes={"policy": scheme},
            auto_register_policy_transforms=False,
        )
        stack.callback(collector.shutdown)
        rollouts = recipes.BackgroundRollouts(
            collector, ahead=config.rollouts.ahead, timeout_s=config.rollouts.timeout_s
        )
        stack.enter_context(rollouts)
        # What is written passes through these from the last to the first: MCAdvantage compares the answers to one
        # question, then those that are too old are left out.
        is_fresh = PolicyAgeFilter(
            lambda: servers.weight_version,
            config.rollouts.max_staleness,
            policy_version_key=("generation", "policy_version"),
            strict=True,
        )
        buffer = ReplayBuffer(
            storage=LazyStackStorage(batch_size),
            transform=Compose(is_fresh, MCAdvantage(grpo_size=settings.answers)),
            batch_size=settings.micro_batch,
        )
        test, saving = recipes.EvaluateSettings(**config.evaluate), recipes.CheckpointSettings(**config.checkpoint)
        test_env = recipes.make_test_env(task, tokenizer, questions=test.questions, answers=test.answers)
        test_policy = policy.get_new_version()

        clock = recipes.StepClock()
        if last_step == 0 and test.is_due(0, settings.steps):
            run.log_evaluation(0, recipes.evaluate(test_env, test_policy, answers=test.answers, ks=test.ks))
        for step in range(last_step + 1, settings.steps + 1):
            bar.set_postfix_str("waiting for rollouts")
            with clock("wait"):
                buffer.empty()
                num_dropped = 0
                while len(buffer) == 0:
                    buffer.extend(rollouts.take().reshape(-1))
                    num_dropped += batch_size - len(buffer)
            batch = recipes.Sequences.from_tensordict(buffer[:]).to(device)
            trained_version = servers.weight_version

            # the policy gradient, weighted token by token; micro-batches add up to the batch
            pi_N, entropy_N = torch.empty_like(batch.server_N), torch.empty_like(batch.server_N)
            for epoch in range(settings.epochs):
                with clock("train"):
                    for tokens, part in batch.split(settings.micro_batch):
                        bar.set_postfix_str(f"training {tokens.stop}/{batch.num_tokens} tokens")
                        with autocast:
                            scores = recipes.score_tokens(model, part, temperature=temperature, entropy=epoch == 0)
                        if epoch == 0:  # no step has been taken yet: this is the policy before the update
                            pi_N[tokens], entropy_N[tokens] = scores.log_probs_N.detach(), scores.entropy_N
                        weight_N = recipes.truncated_importance_weights(
                            pi_N[tokens], part.server_N, cap=config.loss.importance_cap
                        )
                        loss_N = recipes.clipped_policy_loss(
                            scores.log_probs_N, pi_N[tokens], part.advantage_N, clip_epsilon=config.loss.clip_epsilon
                        )
                        ((weight_N * loss_N).sum() / batch.num_tokens).backward()
                    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()

            bar.set_postfix_str("sending the weights")
            with clock("sync"):
                collector.update_policy_weights_(model)
            position = max(position, int(batch.position_B.max()) + 1)
            with clock("evaluate"):
                if test.is_due(step, settings.steps):
                    run.log_evaluation(step, recipes.evaluate(test_env, test_policy, answers=test.answers, ks=test.ks))
            with clock("save"):
                run.log_samples(recipes.sample_lines(step, batch, tokenizer))
            ages = recipes.staleness_histogram(batch.version_N, trained_version)
            seconds = clock.lap()
            row = {
                "step": step,
                "reward_mean": batch.reward_B.mean(),
                "response_tokens_mean": batch.num_tokens / len(batch),
                "generate_tokens_per_s": batch.num_tokens / rollouts.collect_s,
                "sync_s": seconds["sync_s"],
                "sync_mb": scheme.last_report.num_bytes / 1e6,
                "weight_version": servers.weight_version,
                **recipes.training_signal(
                    trainer_N=pi_N,
                    server_N=batch.server_N,
                    entropy_N=entropy_N,
                    clip_epsilon=config.loss.clip_epsilon,
                ),
                "right_rate": batch.right_B.float().mean(),
                "truncated_fraction": batch.truncated_B.float().mean(),
                "staleness_mean": sum(age * count for age, count in ages.items()) / batch.num_tokens,
                "staleness_max": max(ages, default=0),
                "staleness_histogram": recipes.staleness_text(ages),
                "dropped_answers": num_dropped,
                "train_tokens_per_s": batch.num_tokens * settings.epochs / seconds["train_s"],
                "collect_s": rollouts.collect_s,  # beside the trainer's own work
                **seconds,
                "grad_norm": grad_norm,
                "learning_rate": scheduler.get_last_lr()[0],
                **recipes.peak_memory_gb(device),
            }
            bar.write(STEP_LINE.format(**run.log(row)))
            bar.update()
            with clock("save"):  # after the step's row: a run that is killed here does the step again, row and all
                if saving.is_due(step, settings.steps) or stop.requested:
                    run.checkpoints.save(
                        step=step,
                        data_position=position,
                        weight_version=servers.weight_version,
                        modules={"model": model},
                        optimizer=optimizer,
                        scheduler=scheduler,
                    )
            if stop.requested:
                break
        bar.set_postfix_str("stopping")
    if stop.requested:
        raise SystemExit(f"interrupted after step {step}; to go on: python {RECIPE} --resume {folder}")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def main() -> None:
    arguments = recipes.parse_arguments(RECIPE, description=__doc__)
    tensordict.set_list_to_stack(True).set()  # TorchRL's language model parts rely on it
    disable_progress_bar()  # transformers' own
    recipes.keep_freed_memory()
    try:
        train(recipes.load_config(RECIPE, arguments), resume=arguments.resume is not None)
    except SGLangError as error:
        raise SystemExit(f"{RECIPE.name}: {error}") from error


if __name__ == "__main__":
    main()
