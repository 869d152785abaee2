"""A recipe's command line."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchrl_sglang.errors import ConfigError
from torchrl_sglang.recipes.setup.names import meant_setting

__all__ = ["Arguments", "parse_arguments", "presets_of"]

_OPTIONS = ("--preset", "--resume", "--overwrite", "--help")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """A recipe's parsed command line.

    Attributes:
        preset: name of the YAML preset.
        resume: folder of the run to resume; ``None`` starts a new run.
        overwrite: replace an earlier run in the folder of the new one.
        overrides: hydra overrides.
    """

    preset: str = "cpu"
    resume: Path | None = None
    overwrite: bool = False
    overrides: tuple[str, ...] = ()


def parse_arguments(
    recipe: Path,
    words: Sequence[str] | None = None,
    *,
    description: str | None = None,
    known: Callable[[str], Sequence[str]] = lambda preset: (),
) -> Arguments:
    """Parse a recipe's command line. Options can't be abbreviated, and an unknown one ends the program.

    Args:
        recipe: the recipe's file; its presets are in ``config/<name>/`` beside it.
        words: the command line; ``None`` reads the program's own.
        description: text for ``--help``.
        known: called after a mistake, with the preset: the settings to suggest one from.
    """
    parser = argparse.ArgumentParser(
        prog=recipe.name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=presets_of(recipe), default="cpu", help="YAML preset (default: cpu)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", type=Path, metavar="FOLDER", help="resume the run in this folder")
    start.add_argument("--overwrite", action="store_true", help="replace an earlier run in run.folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. train.lr=1e-6")
    parsed, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        hint = _hint(unknown[0], parsed.overrides, known(parsed.preset))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return Arguments(
        preset=parsed.preset,
        resume=parsed.resume,
        overwrite=parsed.overwrite,
        overrides=tuple(parsed.overrides),
    )


def presets_of(recipe: str | Path) -> list[str]:
    """Names of a recipe's presets.

    Raises:
        ConfigError: it has none.
    """
    recipe = Path(recipe)
    folder = recipe.resolve().parent / "config" / recipe.stem
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if not names:
        raise ConfigError(f"{recipe.name} has no presets: there is no YAML file in {folder}")
    return names


def _hint(option: str, rest: Sequence[str], known: Sequence[str]) -> str:
    """What was meant by an option that doesn't exist: another option, or a setting."""
    name, _, value = option.partition("=")
    abbreviated = [each for each in _OPTIONS if len(name) > 3 and each.startswith(name)]
    close = [*abbreviated, *difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.8)]
    if close:
        return f". Did you mean {close[0]}?"
    setting = meant_setting(name.lstrip("-"), known)
    if setting is None:
        return ". Settings are written key=value, such as train.steps=3"
    value = value or next((word for word in rest if "=" not in word), "VALUE")
    return f". Settings are written key=value: {setting}={value}"
