"""What every recipe can be told: training, evaluation, checkpoints. They check themselves when a config is read."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchrl_sglang.config.checking import nearest_name, require, require_positive

__all__ = ["SCHEDULES", "SETTINGS", "CheckpointSettings", "EvaluateSettings", "RunSettings", "TrainSettings"]

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(kw_only=True)
class TrainSettings:
    """Node ``train``: what a step is, and how the trainer learns from it."""

    steps: int = 16
    """Optimizer steps of the whole run."""
    questions: int = 4
    """Questions per step."""
    answers: int = 8
    """Answers per question: the group whose rewards are compared."""
    micro_batch: int = 8
    """Answers per forward and backward pass; gradients add up to those of the whole step."""
    epochs: int = 1
    """How often each batch is gone through; each time is one optimizer step more."""
    lr: float = 1e-5
    """Learning rate of AdamW, after the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's."""
    weight_decay: float = 0.0
    """AdamW's."""
    schedule: str = "constant"
    """What the learning rate does after the warm-up: ``constant``, or ``linear`` or ``cosine`` down to 0 at the end."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises from 0."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    device: str = "auto"
    """The trainer's: ``auto`` is the last of two or more GPUs, else the CPU."""
    autocast: str = "float32"
    """What the trainer computes in: ``float32`` or ``bfloat16``. Its weights are float32 in any case."""
    seed: int = 0
    """Of the order of questions, the trainer, and the servers launched."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "questions", "answers", "micro_batch", "epochs", "lr", "clip_norm")
        require_positive(self, "weight_decay", "warmup_steps", zero=True)
        require(len(self.betas) == 2, f"betas are two numbers, got {self.betas}")
        require(
            self.schedule in SCHEDULES,
            f"schedule must be one of {SCHEDULES}, got {self.schedule!r}.{nearest_name(self.schedule, SCHEDULES)}",
        )
        require(
            self.autocast in ("float32", "bfloat16"),
            f"autocast must be 'float32' or 'bfloat16', got {self.autocast!r}",
        )

    @property
    def batch_size(self) -> int:
        """Answers per step."""
        return self.questions * self.answers


@dataclass(kw_only=True)
class EvaluateSettings:
    """Node ``evaluate``: how well the model does on questions it is not trained on."""

    every: int = 0
    """Evaluate after each so many steps, and before the first and after the last; 0 never does."""
    questions: int = 16
    """Questions of the held-out split that are asked."""
    answers: int = 8
    """Answers drawn per question: pass@k needs at least k."""
    ks: list[int] = field(default_factory=lambda: [1, 4])
    """The k of pass@k: the chance that at least one of k answers is right."""

    def __post_init__(self) -> None:
        require_positive(self, "questions", "answers")
        require_positive(self, "every", zero=True)
        require(bool(self.ks) and min(self.ks) >= 1, f"ks are numbers of answers, got {self.ks}")
        require(
            max(self.ks) <= self.answers,
            f"pass@{max(self.ks)} can't be estimated from {self.answers} answers per question: raise evaluate.answers",
        )

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to evaluate after ``step``.

        Examples:
            >>> [step for step in range(6) if EvaluateSettings(every=2).is_due(step, last_step=5)]
            [0, 2, 4, 5]
        """
        return self.every > 0 and (step % self.every == 0 or step == last_step)


@dataclass(kw_only=True)
class CheckpointSettings:
    """Node ``checkpoint``: how much work a killed run loses, and how much disk that takes."""

    every: int = 0
    """Save after each so many steps; 0 saves at the end and on Ctrl-C only."""
    keep: int = 1
    """How many are kept."""

    def __post_init__(self) -> None:
        require_positive(self, "keep")
        require_positive(self, "every", zero=True)

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to save after ``step``.

        Examples:
            >>> [step for step in range(6) if CheckpointSettings(every=2).is_due(step, last_step=5)]
            [0, 2, 4, 5]
        """
        return step == last_step or (self.every > 0 and step % self.every == 0)


@dataclass(kw_only=True)
class RunSettings:
    """Node ``run``: where a run's files go, and who else is told."""

    folder: str = "outputs/run"
    """Holds config.yaml, metrics.csv, samples.jsonl, report.png and checkpoints."""
    loggers: list[str] = field(default_factory=list)
    """TorchRL's loggers by name: ``csv``, ``tensorboard``, ``wandb``, ``mlflow``, ``trackio``. metrics.csv is always
    written."""
    report_every_s: float = 30.0
    """Seconds between two drawings of report.png."""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder must be a path")
        require_positive(self, "report_every_s", zero=True)


SETTINGS = {
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "checkpoint": CheckpointSettings,
    "run": RunSettings,
}
"""Config node to what checks it."""
