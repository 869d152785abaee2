"""A run's folder: configuration, numbers per step, a line per answer, a picture, checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchrl.record.loggers import get_logger

from torchrl_sglang.config import nearest_name
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.recipes.run.checkpoints import Checkpoints
from torchrl_sglang.recipes.run.table import Row, Table
from torchrl_sglang.recipes.setup.config import save_config

__all__ = ["LOGGERS", "RunFolder"]

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow", "trackio")
Draw = Callable[[Sequence[Row], Sequence[Row], Path], None]


class RunFolder:
    """Writes a run's files as it goes; a ``with`` block.

    ``metrics.csv`` has a row per step, ``evaluations.csv`` one per evaluation, ``samples.jsonl`` a JSON object per
    answer. A new run replaces what an earlier one left under these names, its checkpoints too. One that resumes cuts
    the files back to the checkpoint's step, so that the steps it does again are not there twice.

    Args:
        path: the folder; made when it isn't there.
        config: saved as ``config.yaml``, for ``--resume``; ``None`` saves none.
        resume_step: the step to go on after; ``None`` starts a new run.
        keep_checkpoints: how many checkpoints are kept.
        loggers: TorchRL loggers by name that get every number too.
        draw: draws the picture: ``draw(rows of metrics, rows of evaluations, path)``.
        draw_every_s: seconds between two drawings; the last one comes when the block ends.

    Raises:
        ConfigError: an unknown logger.

    Attributes:
        metrics: the table of steps.
        evaluations: the table of evaluations.
        checkpoints: the run's :class:`Checkpoints`.
    """

    def __init__(
        self,
        path: Path,
        config: DictConfig | None = None,
        *,
        resume_step: int | None = None,
        keep_checkpoints: int = 1,
        loggers: Sequence[str] = (),
        draw: Draw | None = None,
        draw_every_s: float = 30.0,
    ) -> None:
        for name in loggers:
            if name not in LOGGERS:
                raise ConfigError(f"unknown logger {name!r}.{nearest_name(name, LOGGERS)} There are {LOGGERS}")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", keep=keep_checkpoints)
        self._draw = draw
        self._draw_every_s = draw_every_s
        self._drawn_at = time.monotonic()
        if resume_step is None:
            self.checkpoints.clear()
            for old in (self.samples, self.report):
                old.unlink(missing_ok=True)
        else:
            _cut_samples(self.samples, resume_step)
        if config is not None:
            save_config(config, path)
        self.metrics = Table(path / "metrics.csv", resume_step=resume_step)
        self.evaluations = Table(path / "evaluations.csv", resume_step=resume_step)
        self._samples = self.samples.open("a")
        self._loggers = [get_logger(name, logger_name=str(path / "logs"), experiment_name=name) for name in loggers]

    @property
    def samples(self) -> Path:
        """The answers."""
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        """The picture."""
        return self.path / "report.png"

    def log(self, row: Mapping[str, Any]) -> Row:
        """Add a step's numbers to the table, the loggers, and now and then to the picture; see :meth:`Table.add`."""
        added = self.metrics.add(row)
        self._tell_loggers(added)
        if time.monotonic() - self._drawn_at >= self._draw_every_s:
            self.draw()
        return added

    def log_evaluation(self, step: int, found: Mapping[str, float]) -> Row:
        """Add what an evaluation after ``step`` has found; 0 is before the first step."""
        added = self.evaluations.add({"step": step, **found})
        self._tell_loggers(added)
        return added

    def log_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add answers, one JSON object each; every one needs ``step``."""
        for sample in samples:
            self._samples.write(json.dumps(sample) + "\n")
        self._samples.flush()

    def draw(self) -> None:
        """Draw the picture of the steps so far."""
        if self._draw is not None and self.metrics.rows:
            self._draw(self.metrics.rows, self.evaluations.rows, self.report)
        self._drawn_at = time.monotonic()

    def close(self) -> None:
        """Draw a last time and close the files."""
        self.draw()
        for file in (self.metrics, self.evaluations, self._samples):
            file.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _tell_loggers(self, row: Row) -> None:
        for logger in self._loggers:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    logger.log_scalar(name, value, step=row["step"])


def _cut_samples(path: Path, step: int) -> None:
    if not path.exists():
        return
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1].splitlines(keepends=True)  # a line was being written when the run was killed
    path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
