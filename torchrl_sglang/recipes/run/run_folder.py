"""A run's folder: configuration, metrics per step, samples, report and checkpoints."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig
from torchrl.record.loggers import get_logger

from torchrl_sglang.config import nearest_name
from torchrl_sglang.disk_space import writing
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.recipes.run.checkpoints import Checkpoints
from torchrl_sglang.recipes.run.report import unfinished_report
from torchrl_sglang.recipes.run.table import Row, Table
from torchrl_sglang.recipes.setup.config import save_config
from torchrl_sglang.recipes.setup.results import refuse_results, remove_results

__all__ = ["LOGGERS", "RunFolder"]

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow", "trackio")
Draw = Callable[[Sequence[Row], Sequence[Row], Path], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """The open files of a run that has begun."""

    metrics: Table
    evaluations: Table
    samples: TextIO
    loggers: Sequence[Any]


class RunFolder:
    """Writes a run's files as it goes; a ``with`` block.

    ``metrics.csv`` has a row per step, ``evaluations.csv`` a row per evaluation, ``samples.jsonl`` a JSON object per
    answer. A new run refuses a folder that holds an earlier one, unless ``overwrite`` is set. A resumed run removes the
    rows after the checkpoint's step, so that repeated steps are not in the files twice. Nothing on the disk changes
    before :meth:`begin`, which the first write calls: a run whose servers don't start leaves an earlier one as it was.

    Args:
        path: the folder; created if missing.
        config: saved as ``config.yaml``, for ``--resume``; ``None`` saves nothing.
        resume_step: the last step to keep; ``None`` starts a new run.
        overwrite: remove an earlier run in the folder when this one begins.
        keep_checkpoints: number of checkpoints to keep.
        loggers: names of TorchRL loggers that also receive every number.
        draw: draws the report: ``draw(rows of metrics, rows of evaluations, path)``.
        draw_every_s: minimum number of seconds between two drawings; the last one is made when the block ends.

    Raises:
        ConfigError: an unknown logger, or the folder holds an earlier run.
        StorageError: the folder can't be written to; raised by the methods that write.

    Attributes:
        checkpoints: the run's :class:`Checkpoints`.
    """

    def __init__(
        self,
        path: Path,
        config: DictConfig | None = None,
        *,
        resume_step: int | None = None,
        overwrite: bool = False,
        keep_checkpoints: int = 1,
        loggers: Sequence[str] = (),
        draw: Draw | None = None,
        draw_every_s: float = 30.0,
    ) -> None:
        for name in loggers:
            if name not in LOGGERS:
                raise ConfigError(f"unknown logger {name!r}.{nearest_name(name, LOGGERS)} There are {LOGGERS}")
        if resume_step is None and not overwrite:
            refuse_results(path)
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", keep=keep_checkpoints)
        self._config = config
        self._resume_step = resume_step
        self._logger_names = tuple(loggers)
        self._draw = draw
        self._draw_every_s = draw_every_s
        self._drawn_at = time.monotonic()
        self._files: _Files | None = None

    def begin(self) -> None:
        """Make the folder, remove what this run replaces, and open the files. Further calls do nothing."""
        self._open()

    def _open(self) -> _Files:
        if self._files is not None:
            return self._files
        with writing(self.path, "the run"):
            self.path.mkdir(parents=True, exist_ok=True)
            if self._resume_step is None:
                remove_results(self.path)
            else:
                _cut_samples(self.samples, self._resume_step)
            if self._config is not None:
                save_config(self._config, self.path)
        logs = str(self.path / "logs")
        self._files = _Files(
            metrics=Table(self.path / "metrics.csv", resume_step=self._resume_step),
            evaluations=Table(self.path / "evaluations.csv", resume_step=self._resume_step),
            samples=self.samples.open("a"),
            loggers=[get_logger(name, logger_name=logs, experiment_name=name) for name in self._logger_names],
        )
        return self._files

    @property
    def metrics(self) -> Table:
        """The table of steps."""
        return self._open().metrics

    @property
    def evaluations(self) -> Table:
        """The table of evaluations."""
        return self._open().evaluations

    @property
    def samples(self) -> Path:
        """Path of the answers."""
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        """Path of the report."""
        return self.path / "report.png"

    def log(self, row: Mapping[str, Any]) -> Row:
        """Add a step's row to the table and the loggers, and redraw the report if it is due; see :meth:`Table.add`."""
        added = self.metrics.add(row)
        self._log_scalars(added)
        if time.monotonic() - self._drawn_at >= self._draw_every_s:
            self.draw()
        return added

    def log_evaluation(self, step: int, results: Mapping[str, float]) -> Row:
        """Add the results of an evaluation after ``step``; 0 is before the first step."""
        added = self.evaluations.add({"step": step, **results})
        self._log_scalars(added)
        return added

    def log_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add answers, one JSON object each; every object needs ``step``."""
        file = self._open().samples
        with writing(self.samples, "the samples"):
            for sample in samples:
                file.write(json.dumps(sample) + "\n")
            file.flush()

    def draw(self) -> None:
        """Draw the report of the steps so far."""
        if self._draw is not None and self._files is not None and self.metrics.rows:
            with writing(self.report, "the report", incomplete=unfinished_report(self.report)):
                self._draw(self.metrics.rows, self.evaluations.rows, self.report)
        self._drawn_at = time.monotonic()

    def close(self) -> None:
        """Draw the report and close the files."""
        with contextlib.ExitStack() as files:  # a file that can't be written does not keep the others open
            files.enter_context(writing(self.samples, "the samples"))
            if self._files is not None:
                for file in (self._files.metrics, self._files.evaluations, self._files.samples):
                    files.callback(file.close)
            self.draw()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _log_scalars(self, row: Row) -> None:
        for logger in self._open().loggers:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    logger.log_scalar(name, value, step=row["step"])


def _cut_samples(path: Path, step: int) -> None:
    if not path.exists():
        return
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1].splitlines(keepends=True)  # a killed run may leave a partial last line
    kept = path.with_name(f".{path.name}")
    with writing(path, "the samples", incomplete=kept):
        kept.write_text("".join(line for line in complete if json.loads(line)["step"] <= step))
        kept.replace(path)
