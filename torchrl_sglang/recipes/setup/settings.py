"""Settings that all recipes have: the nodes ``train``, ``evaluate``, ``checkpoint`` and ``run``, with their checks."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchrl_sglang.config.checking import nearest_name, require, require_number, require_numbers

__all__ = ["SCHEDULES", "SETTINGS", "CheckpointSettings", "EvaluateSettings", "RunSettings", "TrainSettings"]

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(kw_only=True)
class TrainSettings:
    """Node ``train``: size of a step, optimizer and device."""

    steps: int = 16
    """Optimizer steps of the whole run."""
    questions: int = 4
    """Questions per step."""
    answers: int = 8
    """Answers per question. GRPO compares the rewards within this group, so it needs at least 2."""
    micro_batch: int = 8
    """Answers per forward and backward pass. Gradients are summed over the step, so it changes only memory and time."""
    epochs: int = 1
    """Passes over each batch; each pass ends with an optimizer step."""
    lr: float = 1e-5
    """Learning rate of AdamW after the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Betas of AdamW."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    schedule: str = "constant"
    """Learning rate after the warm-up: ``constant``, or ``linear`` or ``cosine`` down to 0 at the last step."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    clip_norm: float = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it."""
    device: str = "auto"
    """Device of the trainer: ``auto`` is the last GPU if there are two or more, else the CPU."""
    autocast: str = "float32"
    """Dtype of the trainer's forward pass: ``float32`` or ``bfloat16``. The weights are float32 in both cases."""
    seed: int = 0
    """Seed of the order of questions, of the trainer, and of launched servers."""

    def __post_init__(self) -> None:
        require_numbers(self, "steps", "questions", "answers", "micro_batch", "epochs", above=0)
        require_numbers(self, "lr", "clip_norm", above=0)
        require_numbers(self, "weight_decay", "warmup_steps", at_least=0)
        require_numbers(self, "seed", at_least=0, below=2**32)
        require(len(self.betas) == 2, f"betas must be two numbers, got {self.betas!r}")
        for beta in self.betas:
            require_number("each of betas", beta, at_least=0, below=1)
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
    """Node ``evaluate``: evaluation on held-out questions."""

    every: int = 0
    """Evaluate every this many steps, before the first step and after the last; 0 never evaluates."""
    questions: int = 16
    """Questions of the held-out split per evaluation."""
    answers: int = 8
    """Answers per question; pass@k needs at least k."""
    ks: list[int] = field(default_factory=lambda: [1, 4])
    """Values of k for pass@k, the probability that at least one of k answers is right."""

    def __post_init__(self) -> None:
        require_numbers(self, "questions", "answers", above=0)
        require_numbers(self, "every", at_least=0)
        require(bool(self.ks), f"ks must be numbers of answers, got {self.ks!r}")
        for k in self.ks:
            require_number("each of ks", k, whole=True, at_least=1)
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
    """Node ``checkpoint``: how often to save, and how many checkpoints to keep."""

    every: int = 0
    """Save every this many steps; 0 saves only at the end and on Ctrl-C."""
    keep: int = 1
    """Number of checkpoints to keep. Each holds the weights and two optimizer states in float32: 12 bytes per trained
    parameter, 1.6 GB for SmolLM2-135M-Instruct."""
    previous: bool = False
    """Also keep the weights that generated the last answers, in ``checkpoint-previous/`` (``grpo.py`` only)."""

    def __post_init__(self) -> None:
        require_numbers(self, "keep", at_least=1)
        require_numbers(self, "every", at_least=0)

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to save after ``step``.

        Examples:
            >>> [step for step in range(6) if CheckpointSettings(every=2).is_due(step, last_step=5)]
            [0, 2, 4, 5]
        """
        return step == last_step or (self.every > 0 and step % self.every == 0)


@dataclass(kw_only=True)
class RunSettings:
    """Node ``run``: the folder of the run's files, and further loggers."""

    folder: str = "outputs/run"
    """Holds config.yaml, metrics.csv, samples.jsonl, report.png and checkpoints."""
    overwrite: bool = False
    """Replace an earlier run in the folder, as ``--overwrite`` does; otherwise such a folder is refused."""
    loggers: list[str] = field(default_factory=list)
    """TorchRL loggers by name: ``csv``, ``tensorboard``, ``wandb``, ``mlflow``, ``trackio``. metrics.csv is always
    written."""
    report_every_s: float = 30.0
    """Minimum number of seconds between two drawings of report.png."""

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder must be a path")
        require_numbers(self, "report_every_s", at_least=0)


SETTINGS = {
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "checkpoint": CheckpointSettings,
    "run": RunSettings,
}
"""Name of a config node to the record that checks it."""
