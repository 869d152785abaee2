"""A recipe as a program: command line, configuration, what is set for the whole process, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig
from tensordict import set_list_to_stack
from transformers.utils.logging import disable_progress_bar

from torchrl_sglang.errors import SGLangError
from torchrl_sglang.recipes.setup.config import Arguments, load_config, parse_arguments
from torchrl_sglang.recipes.setup.memory import keep_freed_memory

__all__ = ["run_program"]


def run_program(
    recipe: str | Path,
    train: Callable[[DictConfig, bool], bool],
    *,
    description: str | None = None,
    arguments: Arguments | None = None,
) -> None:
    """Read the command line and train.

    Args:
        recipe: the recipe's file.
        train: gets the configuration and whether to resume; returns whether it came to its end, ``False`` after a
            Ctrl-C it has saved for.
        description: what ``--help`` says.
        arguments: instead of the command line.

    Raises:
        SystemExit: with a message and status 1, when interrupted or after one of this package's errors.
    """
    recipe = Path(recipe)
    arguments = arguments or parse_arguments(recipe, description=description)
    set_list_to_stack(True).set()  # TorchRL's language model parts rely on it
    disable_progress_bar()  # transformers' own
    keep_freed_memory()
    folder = None
    try:
        config = load_config(recipe, arguments)
        folder = config.run.folder
        ended = train(config, arguments.resume is not None)
    except SGLangError as error:
        raise SystemExit(f"{recipe.name}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted: the servers are stopped; finished steps are in {folder}/") from None
    if not ended:
        raise SystemExit(
            f"\ninterrupted: the servers are stopped; finished steps are in {folder}/. To go on: "
            f"python {recipe} --resume {folder}"
        )
