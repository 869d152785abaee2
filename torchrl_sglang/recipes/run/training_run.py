"""One training run: what is kept about it, how it starts, goes on, and ends. The loop itself is the recipe's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.run.checkpoints import Checkpoint, Checkpoints
from torchrl_sglang.recipes.run.clock import StepClock
from torchrl_sglang.recipes.run.interrupt import StopRequest
from torchrl_sglang.recipes.run.report import draw_report
from torchrl_sglang.recipes.run.run_folder import RunFolder
from torchrl_sglang.recipes.run.table import Row
from torchrl_sglang.recipes.setup.memory import peak_memory_gb
from torchrl_sglang.recipes.setup.optimizer import make_optimizer
from torchrl_sglang.recipes.setup.settings import CheckpointSettings, EvaluateSettings, TrainSettings

__all__ = ["FIRST_COLUMNS", "Run"]

FIRST_COLUMNS = (
    *("step", "reward_mean", "response_tokens_mean", "generate_tokens_per_s", "sync_s", "sync_mb", "weight_version"),
    "logprob_gap_max",
)


class Run:
    """Optimizer, progress bar, run folder, checkpoints and clock of a run; a ``with`` block.

    ::

        with Run(config, {"model": model}, resume=resume) as run:
            ...
            for step in run.steps():
                with run.clock("train"):
                    ...
                    grad_norm = run.optimizer_step()
                run.log(step, row, line="step {step} | reward {reward_mean:.3f}")
                run.evaluate(step, lambda: {...})
                run.save(step, batch, weight_version=...)

    Args:
        config: has the nodes ``train``, ``evaluate``, ``checkpoint`` and ``run``.
        modules: what is trained, by the names it is saved under; put back to the last checkpoint on a resume.
        resume: go on with the run in ``config.run.folder``.
        learning_rates: of modules, by name, that are not to have ``config.train.lr``.

    Raises:
        ConfigError: settings that don't fit, or a checkpoint of another model.

    Attributes:
        settings: the node ``train``.
        device: the modules'.
        optimizer: AdamW over all parameters that want a gradient.
        scheduler: its learning rate schedule.
        checkpoint: what was resumed from, or ``None``.
        position: number of the first question no finished step has trained on.
        folder: the run's files.
        clock: where time goes.
        bar: the progress bar.
        stop: whether Ctrl-C was pressed.
    """

    def __init__(
        self,
        config: DictConfig,
        modules: Mapping[str, nn.Module],
        *,
        resume: bool = False,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        self.settings = TrainSettings(**config.train)
        self._evaluating = EvaluateSettings(**config.evaluate)
        self._saving = CheckpointSettings(**config.checkpoint)
        self.modules = dict(modules)
        self.device = next(parameter.device for module in modules.values() for parameter in module.parameters())
        torch.manual_seed(self.settings.seed)
        self.optimizer, self.scheduler = make_optimizer(modules, self.settings, learning_rates)
        path = Path(config.run.folder)
        self.checkpoint: Checkpoint | None = None
        if resume:
            self.checkpoint = Checkpoints(path / "checkpoints").latest()
        if self.checkpoint is not None:
            self.checkpoint.restore(self.modules, self.optimizer, self.scheduler)
        self.last_step = 0 if self.checkpoint is None else self.checkpoint.step
        self.position = 0 if self.checkpoint is None else self.checkpoint.data_position
        self.folder = RunFolder(
            path,
            config,
            resume_step=self.last_step if resume else None,
            keep_checkpoints=self._saving.keep,
            loggers=config.run.loggers,
            draw=draw_report,
            draw_every_s=config.run.report_every_s,
        )
        self.bar = tqdm(total=self.settings.steps, initial=self.last_step, unit="step", dynamic_ncols=True)
        self.stop = StopRequest(lambda: self.bar.write("stopping after this step; Ctrl-C again stops at once"))
        self.clock = StepClock("evaluate", "save")  # they come after the row they belong to

    def say(self, text: str) -> None:
        """Show what is going on beside the progress bar."""
        self.bar.set_postfix_str(text)

    def steps(self) -> Iterator[int]:
        """The steps to do, from the one after the checkpoint; ends early after a Ctrl-C."""
        self.clock.lap()
        with self.stop:
            for step in range(self.last_step + 1, self.settings.steps + 1):
                yield step
                if self.stop.requested:
                    return

    def optimizer_step(self) -> float:
        """Clip the gradients, step, move the learning rate on; the gradients' norm before clipping."""
        wanted = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(wanted, self.settings.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return float(norm)

    def log(self, step: int, row: Mapping[str, Any], *, line: str) -> Row:
        """Write a step's numbers, with the clock's, the learning rate and memory, and print some of them.

        Args:
            step: the step that has ended.
            row: name to number or text.
            line: what to print, a format string over the row.
        """
        whole = {
            "step": step,
            **row,
            **self.clock.lap(),
            "learning_rate": self.scheduler.get_last_lr()[0],
            **peak_memory_gb(self.device),
        }
        ordered = {name: whole[name] for name in FIRST_COLUMNS if name in whole} | whole
        added = self.folder.log(ordered)
        self.bar.write(line.format(**added))
        self.bar.update()
        return added

    def evaluate(self, step: int, evaluation: Callable[[], Mapping[str, float]]) -> None:
        """Run and log an evaluation if one is due after ``step``; 0 is before the first, and not due on a resume."""
        with self.clock("evaluate"):
            if self._evaluating.is_due(step, self.settings.steps) and not (step == 0 and self.last_step > 0):
                self.say("evaluating")
                found = self.folder.log_evaluation(step, evaluation())
                told = ", ".join(f"{name} {value:.3f}" for name, value in found.items() if name != "step")
                self.bar.write(f"after step {step} | {told}")

    def save(self, step: int, trained: Sequences, *, weight_version: int) -> None:
        """Write a checkpoint if one is due after ``step``, or if the run is about to stop.

        Comes after :meth:`log`: a run that is killed in between does the step again, row and all.

        Args:
            step: the step that has ended.
            trained: the answers it trained on, which tell how far the questions have come.
            weight_version: version of these weights on the servers.
        """
        self.position = trained.next_position(self.position, self.settings.questions)
        with self.clock("save"):
            if self._saving.is_due(step, self.settings.steps) or self.stop.requested:
                self.say("saving")
                self.folder.checkpoints.save(
                    step=step,
                    data_position=self.position,
                    weight_version=weight_version,
                    modules=self.modules,
                    optimizer=self.optimizer,
                    scheduler=self.scheduler,
                )

    def close(self) -> None:
        """Draw the last picture and close files and bar."""
        self.folder.close()
        self.bar.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
