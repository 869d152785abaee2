"""A CSV table that grows by a row per step and stays readable if the process is killed at any moment.

It uses the standard library's csv module. TorchRL's ``CSVLogger`` writes one file per column without a header, and has
no way to remove the rows after the step that a run resumes from; it can be added with ``run.loggers=[csv]``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torchrl_sglang.disk_space import writing
from torchrl_sglang.errors import ConfigError

__all__ = ["Row", "Table", "read_metrics"]

Row = dict[str, Any]


class Table:
    """Rows of numbers and texts by step; the file is complete after every row.

    The first row defines the columns. A resumed run keeps the rows up to a step and writes the later ones again.

    Args:
        path: the CSV file; created with the first row.
        resume_step: last step to keep in an existing file; ``None`` removes the file.

    Attributes:
        rows: all rows so far, including those kept from before a resume.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> with Table(path) as table:
        ...     for step in (1, 2, 3):
        ...         _ = table.add({"step": step, "reward": step / 2})
        >>> with Table(path, resume_step=1) as table:
        ...     _ = table.add({"step": 2, "reward": 9.5})
        >>> read_metrics(path)
        [{'step': 1, 'reward': 0.5}, {'step': 2, 'reward': 9.5}]
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._file: TextIO | None = None
        self._writer: csv.DictWriter[str] | None = None
        if resume_step is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
            path.unlink()
            for row in kept:
                self.add(row)

    def add(self, row: Mapping[str, Any]) -> Row:
        """Write a row.

        Args:
            row: column to number or text; tensors of one element become numbers. It must have ``step``.

        Returns:
            The row with Python numbers.

        Raises:
            ConfigError: the columns differ from the first row's.
            StorageError: the row could not be written.
        """
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
        with writing(self.path, "the table"):
            if self._writer is None or self._file is None:
                self._file = self.path.open("w", newline="")
                self._writer = csv.DictWriter(self._file, list(plain))
                self._writer.writeheader()
            different = set(plain) ^ set(self._writer.fieldnames)
            if different:
                raise ConfigError(f"the columns of {self.path.name} are the first row's; {sorted(different)} differ")
            self._writer.writerow({name: _text(value) for name, value in plain.items()})
            self._file.flush()
        self.rows.append(plain)
        return plain

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with writing(self.path, "the table"):
                self._file.close()

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[Row]:
    """Read the rows of a table, with numbers converted; an incomplete last line is left out.

    Raises:
        ConfigError: the file does not exist.
    """
    if not path.exists():
        raise ConfigError(f"there is no {path}")
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1].splitlines()
    return [{name: _number(value) for name, value in row.items()} for row in csv.DictReader(complete)]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
