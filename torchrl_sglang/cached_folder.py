"""A folder that is built once: in a temporary folder, then renamed, and recognised by a record of its recipe."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torchrl_sglang.errors import ConfigError

__all__ = ["cached_folder", "holds"]

_RECIPE = "made_from.json"


def cached_folder(path: Path, recipe: Mapping[str, object], build: Callable[[Path], None]) -> Path:
    """Return ``path``, filled by ``build`` unless it already holds the result of the same ``recipe``.

    The folder is built under another name and renamed when it is complete. So an interrupted build leaves nothing that
    looks complete, and two processes may build at the same time.

    Args:
        path: the folder.
        recipe: what decides its content, as JSON values; stored in the folder.
        build: fills the empty folder that it gets.

    Returns:
        ``path``, absolute.

    Raises:
        ConfigError: ``path`` holds something that this function did not build; nothing is deleted.

    Examples:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "greeting"
        >>> built = []
        >>> def build(folder):
        ...     built.append((folder / "hello.txt").write_text("hello"))
        >>> for recipe in ({"version": 1}, {"version": 1}, {"version": 2}):
        ...     folder = cached_folder(target, recipe, build)
        >>> len(built), sorted(file.name for file in folder.iterdir())
        (2, ['hello.txt', 'made_from.json'])
    """
    path = path.absolute()
    if holds(path, recipe):
        return path
    _refuse_foreign(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    partial.chmod(0o755)
    try:
        build(partial)
        (partial / _RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
        _move_into_place(partial, path, recipe)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def holds(path: Path, recipe: Mapping[str, object]) -> bool:
    """Whether ``path`` is a complete result of ``recipe``."""
    return _made_from(path) == recipe


def _made_from(path: Path) -> object:
    try:
        return json.loads((path / _RECIPE).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _refuse_foreign(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{path} is a file, not a folder: choose another path")
    if any(path.iterdir()) and not (path / _RECIPE).exists():
        raise ConfigError(f"{path} holds files that were not made here and are not overwritten: choose an empty folder")


def _move_into_place(partial: Path, path: Path, recipe: Mapping[str, object]) -> None:
    if holds(path, recipe):  # another process was faster, and may already read its files
        return
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
    try:
        partial.rename(path)
    except OSError:
        if not holds(path, recipe):
            raise
