"""State of one training run: optimizer, files, checkpoints, clock. The training loop is in the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.run.checkpoints import Checkpoints
from torchrl_sglang.recipes.run.clock import StepClock
from torchrl_sglang.recipes.run.display import Display
from torchrl_sglang.recipes.run.interrupt import StopRequest
from torchrl_sglang.recipes.run.pictures import draw_pictures
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
        modules: name to trained module; restored from the last checkpoint on a resume.
        resume: resume the run in ``config.run.folder``.
        learning_rates: module name to learning rate, for modules that do not use ``config.train.lr``.

    Raises:
        ConfigError: invalid settings, or a checkpoint of other modules.

    Attributes:
        settings: the node ``train``.
        device: device of the modules.
        optimizer: AdamW over all parameters that require a gradient.
        scheduler: the learning rate schedule.
        resumed_version: weight version in the checkpoint that the run resumed from; ``None`` without one.
        position: number of the first question that no finished step has trained on.
        folder: the run's files.
        clock: measures the phases of a step.
        display: shows phases and steps.
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
        checkpoint = Checkpoints(path / "checkpoints").latest() if resume else None
        if checkpoint is not None:
            checkpoint.restore(self.modules, self.optimizer, self.scheduler)
        self.last_step = 0 if checkpoint is None else checkpoint.step
        self.position = 0 if checkpoint is None else checkpoint.data_position
        self.resumed_version = None if checkpoint is None else checkpoint.weight_version
        self.folder = RunFolder(
            path,
            config,
            resume_step=self.last_step if resume else None,
            overwrite=bool(config.run.get("overwrite")),
            keep_checkpoints=self._saving.keep,
            loggers=config.run.loggers,
            draw=draw_pictures,
            draw_every_s=config.run.report_every_s,
        )
        self.display = Display(self.settings.steps, self.last_step)
        self.stop = StopRequest(lambda: self.display.line("stopping after this step; Ctrl-C again stops at once"))
        self.clock = StepClock("evaluate", "save")  # they run after the step's row is written

    def say(self, text: str) -> None:
        """Show the current activity: while loading on a line of its own, then beside the progress bar."""
        self.display.say(text)

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps, from the one after the checkpoint; end early after Ctrl-C.

        With the first one, the folder's files of an earlier run are replaced.
        """
        self.folder.begin()
        self.display.start()
        self.clock.lap()
        with self.stop:
            for step in range(self.last_step + 1, self.settings.steps + 1):
                yield step
                if self.stop.requested:
                    return

    def optimizer_step(self) -> float:
        """Clip the gradients, step optimizer and schedule. Returns the gradients' norm before clipping."""
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.settings.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return float(norm)

    def log(self, step: int, row: Mapping[str, Any], *, line: str) -> Row:
        """Write a step's row, add times, learning rate and memory to it, and print a line.

        Args:
            step: the finished step.
            row: column to number or text.
            line: format string of the printed line; its fields are columns.
        """
        columns = {
            "step": step,
            **row,
            **self.clock.lap(),
            "learning_rate": self.scheduler.get_last_lr()[0],
            **peak_memory_gb(self.device),
        }
        ordered = {name: columns[name] for name in FIRST_COLUMNS if name in columns} | columns
        added = self.folder.log(ordered)
        self.display.line(line.format(**added))
        self.display.step()
        return added

    def evaluate(self, step: int, evaluation: Callable[[], Mapping[str, float]]) -> None:
        """Run and log an evaluation if one is due after ``step``; step 0 (before the first) is skipped on a resume."""
        with self.clock("evaluate"):
            if self._evaluating.is_due(step, self.settings.steps) and not (step == 0 and self.last_step > 0):
                self.say("evaluating")
                results = self.folder.log_evaluation(step, evaluation())
                text = ", ".join(f"{name} {value:.3f}" for name, value in results.items() if name != "step")
                self.display.line(f"after step {step} | {text}")

    def save(self, step: int, trained: Sequences, *, weight_version: int) -> None:
        """Write a checkpoint if one is due after ``step``, or if the run is about to stop.

        Call it after :meth:`log`: a run that is killed in between repeats the step and replaces its row.

        Args:
            step: the finished step.
            trained: the answers that the step trained on; they give the position in the questions.
            weight_version: version of the new weights on the servers.
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
        """Draw the report, and close files and progress bar."""
        self.folder.close()
        self.display.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
