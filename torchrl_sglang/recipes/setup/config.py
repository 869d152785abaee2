"""A recipe's configuration: a YAML preset, overrides from the command line, or what an earlier run has saved.

    python recipe.py                                   # the preset config/recipe/cpu.yaml beside recipe.py
    python recipe.py --preset gpu train.lr=1e-6        # another preset, one value changed
    python recipe.py engine.url=http://host:30000      # servers that run already, instead of launching some
    python recipe.py --resume outputs/recipe           # go on where that run stopped; overrides still work

Overrides are hydra's: ``key=value``, ``+key=value`` for a key that the preset doesn't have, ``~key`` to remove one.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchrl_sglang.config import nearest_name
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.hydra_configs import SGLangEngineConfig, register_hydra_configs
from torchrl_sglang.recipes.setup.settings import SETTINGS
from torchrl_sglang.testing import smollm2_checkpoint

__all__ = [
    "CONFIG_FILE",
    "Arguments",
    "add_arguments",
    "load_config",
    "override",
    "parse_arguments",
    "presets_of",
    "read_arguments",
    "save_config",
]

CONFIG_FILE = "config.yaml"
_ALSO_ATTACHED = ("url", "name", "router", "_target_", "_partial_")
_LAUNCH_ONLY = tuple(field.name for field in fields(SGLangEngineConfig) if field.name not in _ALSO_ATTACHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """A recipe's command line.

    Attributes:
        preset: name of the YAML preset.
        resume: folder of the run to go on with, or ``None`` to start one.
        overrides: ``key=value`` words.
    """

    preset: str = "cpu"
    resume: Path | None = None
    overrides: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser, presets: Sequence[str]) -> None:
    """Give a parser the words that all recipes have in common."""
    parser.add_argument("--preset", choices=presets, default="cpu", help="which settings to start from (default cpu)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. train.lr=1e-6")


def override(key: str, value: object) -> str:
    r"""An override that gives ``key`` this very value, whatever characters a text has.

    Examples:
        >>> override("train.lr", 1e-6), override("model", "/it's here/a=b")
        ('train.lr=1e-06', "model='/it\\'s here/a=b'")
    """
    if isinstance(value, str):
        # in hydra's grammar a backslash is one, unless a quote follows: then it takes two
        value = "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"
    return f"{key}={value}"


def parse_arguments(recipe: Path, words: Sequence[str] | None = None, *, description: str | None = None) -> Arguments:
    """Read a recipe's command line.

    Args:
        recipe: the recipe's file; its presets lie in ``config/<name>/`` beside it.
        words: the command line; ``None`` is the program's.
        description: what ``--help`` says.
    """
    parser = argparse.ArgumentParser(
        prog=recipe.name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, presets_of(recipe))
    return read_arguments(parser.parse_args(words))


def read_arguments(found: argparse.Namespace) -> Arguments:
    """What :func:`add_arguments` asked for."""
    return Arguments(preset=found.preset, resume=found.resume, overrides=tuple(found.overrides))


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


def load_config(recipe: Path, arguments: Arguments) -> DictConfig:
    """Compose, change and check a recipe's configuration.

    Args:
        recipe: the recipe's file.
        arguments: its command line.

    Returns:
        The configuration; reading a key it doesn't have raises. Its interpolations stay, so that a saved configuration
        can be changed in one place too.

    Raises:
        ConfigError: an unknown key (the message names the nearest), a value that doesn't fit, a missing run to resume.
    """
    if arguments.resume is None:
        folder, name = recipe.resolve().parent / "config", f"{recipe.stem}/{arguments.preset}"
    else:
        folder, name = arguments.resume.resolve(), Path(CONFIG_FILE).stem
        if not (folder / CONFIG_FILE).exists():
            raise ConfigError(f"there is no run to resume in {arguments.resume}: {CONFIG_FILE} is missing")
    config = _compose(folder, name, arguments.overrides)
    if arguments.resume is not None:
        config.run.folder = str(arguments.resume)
    _attach_instead_of_launching(config, arguments.overrides)
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
        for node, settings in SETTINGS.items():
            if node in config:
                settings(**values[node])
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration does not fit together: {error}") from error
    return config


def save_config(config: DictConfig, folder: Path) -> None:
    """Write the configuration where ``--resume`` finds it."""
    OmegaConf.save(config, folder / CONFIG_FILE)


def _compose(folder: Path, name: str, overrides: Sequence[str]) -> DictConfig:
    _register()
    GlobalHydra.instance().clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hydra 1.3 calls what omegaconf 2.4 calls deprecated
        with initialize_config_dir(str(folder), version_base=None):
            known = sorted(_keys(compose(name)))
            for override in _parse(overrides):
                _require_known(override, known)
            try:
                return compose(name, overrides=_replacing_whole_nodes(overrides))
            except (HydraException, OmegaConfBaseException) as error:
                cause = error.__cause__ or error
                raise ConfigError(f"{' '.join(overrides)}: {str(cause).splitlines()[0]}") from error


def _register() -> None:
    register_hydra_configs()
    store = ConfigStore.instance()
    for node, settings in SETTINGS.items():
        store.store(group=f"{node}_settings", name="default", node=settings)
    # omegaconf 2.4 calls the old name deprecated, 2.3 does not know the new one
    register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
    register("smollm2", lambda: str(smollm2_checkpoint()), replace=True)


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return list(OverridesParser.create().parse_overrides(list(overrides)))
    except HydraException as error:
        raise ConfigError(f"overrides are written key=value: {str(error).splitlines()[0]}") from error


def _replacing_whole_nodes(overrides: Sequence[str]) -> list[str]:
    """``task={...}`` means that task and nothing of the preset's; hydra alone would mix the two."""
    replaced: list[str] = []
    for word in overrides:
        replaced += ["~task", f"+{word}"] if word.startswith("task=") else [word]
    return replaced


def _require_known(override: Override, known: Sequence[str]) -> None:
    key = override.key_or_group
    if override.is_add() or key in known:
        return
    parent, _, _ = key.rpartition(".")
    siblings = [one for one in known if one.rpartition(".")[0] == parent]
    hint = nearest_name(key, [one for one in known if one != parent])
    if not hint and parent and siblings:
        hint = f" There are {', '.join(siblings)}."
    raise ConfigError(f"unknown setting {key!r}.{hint} A new key is added with +{key}=...")


def _keys(node: Any, above: str = "") -> Iterator[str]:
    """Every dotted key, of inner nodes too, without looking through interpolations."""
    for name in node:
        key = f"{above}{name}"
        yield key
        if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            inner = node._get_node(name)
            if OmegaConf.is_dict(inner) and not inner._is_none():
                yield from _keys(inner, f"{key}.")


def _attach_instead_of_launching(config: DictConfig, overrides: Sequence[str]) -> None:
    """``engine.url`` names running servers: what a preset says of launching them is void, what the user says is wrong.

    Raises:
        ConfigError: overrides that only make sense for servers to be launched.
    """
    for node in (one for one in ("engine", "reference_engine") if one in config and config[one].get("url") is not None):
        void = [name for name in _LAUNCH_ONLY if name in config[node]]
        said = [override.key_or_group for override in _parse(overrides)]
        wrong = [f"{node}.{name}" for name in void if f"{node}.{name}" in said]
        if wrong:
            raise ConfigError(f"{node}.url attaches to servers that run already: {', '.join(wrong)} can't be honoured")
        for name in void:
            config[node][name] = None
