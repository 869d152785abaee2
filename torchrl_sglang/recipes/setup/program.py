"""Run a recipe as a program: command line, configuration, process-wide settings, exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig
from tensordict import set_list_to_stack
from transformers.utils.logging import disable_progress_bar

from torchrl_sglang.errors import SGLangError
from torchrl_sglang.recipes.setup.arguments import parse_arguments
from torchrl_sglang.recipes.setup.config import known_settings, load_config
from torchrl_sglang.recipes.setup.memory import keep_freed_memory

__all__ = ["run_program"]


def run_program(
    recipe: str | Path,
    train: Callable[[DictConfig, bool], bool],
    *,
    description: str | None = None,
    words: Sequence[str] | None = None,
) -> None:
    """Read the command line, load the configuration and train.

    Args:
        recipe: the recipe's file.
        train: called with the configuration and whether to resume. Returns ``True`` when training is complete and
            ``False`` when Ctrl-C ended it early, after a checkpoint was saved.
        description: text for ``--help``.
        words: the command line; ``None`` reads the program's own.

    Raises:
        SystemExit: with a message and status 1, after Ctrl-C or one of this package's errors.
    """
    recipe = Path(recipe)
    arguments = parse_arguments(
        recipe, words, description=description, known=lambda preset: known_settings(recipe, preset)
    )
    set_list_to_stack(True).set()  # TorchRL's language model classes need it
    disable_progress_bar()  # of transformers
    keep_freed_memory()
    folder = None
    try:
        config = load_config(recipe, arguments)
        folder = config.run.folder
        sys.stderr.write(f"{recipe.name}: model {config.model}, results in {folder}/\n")
        is_complete = train(config, arguments.resume is not None)
    except SGLangError as error:
        raise SystemExit(f"{recipe.name}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted: the servers are stopped; finished steps are in {folder}/") from None
    if not is_complete:
        raise SystemExit(
            f"\ninterrupted: the servers are stopped; finished steps are in {folder}/. To continue: "
            f"python {recipe} --resume {folder}"
        )
