"""The files of an earlier run in a folder: a new run neither replaces nor mixes with them unasked."""

from __future__ import annotations

import shutil
from pathlib import Path

from torchrl_sglang.errors import ConfigError

__all__ = ["CONFIG_FILE", "refuse_results", "remove_results", "results_in"]

CONFIG_FILE = "config.yaml"
_RECORDS = ("metrics.csv", "evaluations.csv", "samples.jsonl", "samples.html", "report.png", "checkpoints")
# Names that other programs use too: they count only beside a run's configuration.
_COMMON_NAMES = ("checkpoint", "checkpoint-previous", "model", "adapter", "logs")


def results_in(folder: Path) -> list[str]:
    """Names of the files and folders that an earlier run left in ``folder``.

    Examples:
        >>> results_in(Path("/no/such/folder"))
        []
    """
    names = [*_RECORDS, *(_COMMON_NAMES if (folder / CONFIG_FILE).exists() else ())]
    return [name for name in names if _holds_something(folder / name)]


def refuse_results(folder: Path) -> None:
    """Refuse a folder that holds an earlier run.

    Raises:
        ConfigError: it does; the message names the three ways to go on.
    """
    found = results_in(folder)
    if found:
        raise ConfigError(
            f"{folder} holds the results of an earlier run ({', '.join(found)}); nothing was changed. To continue that "
            f"run: --resume {folder}. To keep it and start another: run.folder=ANOTHER. To replace it: --overwrite"
        )


def remove_results(folder: Path) -> None:
    """Remove what :func:`results_in` finds; other files stay."""
    for name in results_in(folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()
