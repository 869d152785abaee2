"""Load and check a recipe's configuration: a YAML preset or a saved run, changed by hydra overrides.

    python recipe.py                                   # the preset config/recipe/cpu.yaml beside recipe.py
    python recipe.py --preset gpu train.lr=1e-6        # another preset, one value changed
    python recipe.py engine.url=http://host:30000      # attach to running servers instead of launching some
    python recipe.py --resume outputs/recipe           # resume that run; overrides work here too
    python recipe.py --overwrite                       # replace an earlier run in the same folder

In a preset ``${on_gpu:A,B}`` is A where torch finds a GPU, else B.

Overrides are hydra's: ``key=value``, ``+key=value`` for a key that the preset doesn't have, ``~key`` to remove one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchrl_sglang.config.checking import require
from torchrl_sglang.errors import ConfigError
from torchrl_sglang.hydra_configs import SGLangEngineConfig, register_hydra_configs
from torchrl_sglang.recipes.setup.arguments import Arguments
from torchrl_sglang.recipes.setup.names import setting_hint
from torchrl_sglang.recipes.setup.results import CONFIG_FILE, refuse_results
from torchrl_sglang.recipes.setup.settings import SETTINGS

__all__ = ["known_settings", "load_config", "save_config"]

_FREE_NODE = "weight_sync_schemes.policy.config="
_ENGINES = ("engine", "reference_engine")
_KEY_FILES = ("api_key_file", "admin_api_key_file")
_ALSO_ATTACHED = ("url", "name", "router", *_KEY_FILES, "_target_", "_partial_")
_LAUNCH_ONLY = tuple(field.name for field in fields(SGLangEngineConfig) if field.name not in _ALSO_ATTACHED)


def load_config(recipe: Path, arguments: Arguments) -> DictConfig:
    """Compose a recipe's configuration, apply the overrides and check the result.

    Args:
        recipe: the recipe's file.
        arguments: its command line.

    Returns:
        The configuration; reading a key it doesn't have raises. Interpolations are kept, so that one override also
        changes every place that refers to it when the saved configuration is resumed.

    Raises:
        ConfigError: an unknown key (the message names the nearest), an invalid value, values that don't fit together,
            no run to resume, or a folder with an earlier run that is neither resumed nor to be overwritten.
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
    if arguments.overwrite:
        config.run.overwrite = True
    _refuse_keys(config)
    _attach_instead_of_launching(config, arguments.overrides)
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
        for node, settings in SETTINGS.items():
            if node in config:
                _check_names(node, values[node], settings)
                settings(**values[node])
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration does not fit together: {error}") from error
    _check_across_nodes(values)
    if arguments.resume is None and not config.run.get("overwrite"):
        refuse_results(Path(config.run.folder))
    return config


def known_settings(recipe: Path, preset: str) -> list[str]:
    """Every dotted key of a recipe's preset."""
    with _composing(recipe.resolve().parent / "config"):
        return sorted(_keys(compose(f"{recipe.stem}/{preset}")))


def save_config(config: DictConfig, folder: Path) -> None:
    """Write the configuration into a run's folder, from where ``--resume`` reads it."""
    saved = config.copy()
    if OmegaConf.select(saved, "run.overwrite"):
        saved.run.overwrite = False  # it was meant for this run alone
    OmegaConf.save(saved, folder / CONFIG_FILE)


@contextlib.contextmanager
def _composing(folder: Path) -> Iterator[None]:
    """Within this block hydra composes files of ``folder``."""
    _register()
    GlobalHydra.instance().clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hydra 1.3 calls functions that newer releases of omegaconf deprecate
        with initialize_config_dir(str(folder), version_base=None):
            yield


def _compose(folder: Path, name: str, overrides: Sequence[str]) -> DictConfig:
    with _composing(folder):
        try:
            known = sorted(_keys(compose(name)))
            for override in _parse(overrides):
                _require_known(override, known)
            return compose(name, overrides=_replacing_whole_nodes(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            cause = error.__cause__ or error
            raise ConfigError(f"{' '.join(overrides) or name}: {str(cause).splitlines()[0]}") from error


def _register() -> None:
    register_hydra_configs()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # omegaconf 2.4 calls the function by another name, which meant another one in 2.3
        OmegaConf.register_new_resolver("on_gpu", _on_gpu, replace=True)
    store = ConfigStore.instance()
    for node, settings in SETTINGS.items():
        store.store(group=f"{node}_settings", name="default", node=settings)


def _on_gpu(there: Any, elsewhere: Any) -> Any:
    """``${on_gpu:A,B}`` in a preset is A where torch finds a GPU, else B."""
    return there if torch.cuda.device_count() > 0 else elsewhere


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return list(OverridesParser.create().parse_overrides(list(overrides)))
    except HydraException as error:
        raise ConfigError(f"overrides are written key=value: {str(error).splitlines()[0]}") from error


def _replacing_whole_nodes(overrides: Sequence[str]) -> list[str]:
    """Make ``task={...}`` replace the preset's whole task, which hydra alone would merge with the new one.

    The settings of a sync are a free dictionary, whose keys hydra would refuse.
    """
    replaced: list[str] = []
    for word in overrides:
        if word.startswith("task="):
            replaced += ["~task", f"+{word}"]
        else:
            replaced.append(f"++{word}" if word.startswith(_FREE_NODE) else word)
    return replaced


def _require_known(override: Override, known: Sequence[str]) -> None:
    key = override.key_or_group
    if override.is_add() or key in known:
        return
    raise ConfigError(f"unknown setting {key!r}.{setting_hint(key, known)} A new key is added with +{key}=...")


def _check_names(node: str, given: Mapping[str, Any], settings: type[Any]) -> None:
    """Refuse names that a record of settings doesn't have, from ``+key=value`` or an edited file.

    Raises:
        ConfigError: there is one.
    """
    known = [field.name for field in fields(settings)]
    for name in given:
        if name not in known:
            every = [f"{node}.{one}" for one in known]
            raise ConfigError(f"unknown setting {node}.{name!r}.{setting_hint(f'{node}.{name}', every)}")


def _keys(node: Any, above: str = "") -> Iterator[str]:
    """Every dotted key, inner nodes included; interpolations are not followed."""
    for name in node:
        key = f"{above}{name}"
        yield key
        if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            inner = node._get_node(name)
            if OmegaConf.is_dict(inner) and not inner._is_none():
                yield from _keys(inner, f"{key}.")


def _refuse_keys(config: DictConfig) -> None:
    """Everyone on the machine can read a command line, and the configuration is written into the run's folder.

    Raises:
        ConfigError: it holds a key.
    """
    for node in (one for one in _ENGINES if one in config):
        for name in ("api_key", "admin_api_key"):
            require(
                config[node].get(name) in (None, False),
                f"{node}.{name} would be seen in {CONFIG_FILE} and on the command line: write the key into a file that "
                f"only you can read, and set {node}.{name}_file to its path",
            )


def _attach_instead_of_launching(config: DictConfig, overrides: Sequence[str]) -> None:
    """If ``engine.url`` names running servers, clear the preset's launch settings.

    Raises:
        ConfigError: the user's overrides hold launch settings too.
    """
    for node in (one for one in _ENGINES if one in config and config[one].get("url") is not None):
        launch_settings = [name for name in _LAUNCH_ONLY if name in config[node]]
        overridden = [override.key_or_group for override in _parse(overrides)]
        conflicts = [f"{node}.{name}" for name in launch_settings if f"{node}.{name}" in overridden]
        if conflicts:
            raise ConfigError(
                f"{node}.url attaches to servers that run already: {', '.join(conflicts)} can't be honoured"
            )
        for name in launch_settings:
            config[node][name] = None


def _check_across_nodes(values: Mapping[str, Any]) -> None:
    """Check settings that depend on other nodes, before anything is loaded or deleted.

    Raises:
        ConfigError: settings that don't fit together.
    """
    model, folder = values.get("model"), values.get("run", {}).get("folder")
    if folder and model and Path(model).exists():
        require(
            Path(folder).resolve() not in Path(model).resolve().parents,
            f"model={model} is inside run.folder={folder}, whose files the run replaces: set another run.folder",
        )
    if "critic" not in values and "train" in values:
        require(
            values["train"]["answers"] >= 2,
            "train.answers must be at least 2: GRPO compares the answers to one question with each other",
        )
    max_new_tokens = values.get("policy", {}).get("generate_kwargs", {}).get("max_new_tokens")
    require(
        max_new_tokens is None or max_new_tokens >= 1,
        f"policy.generate_kwargs.max_new_tokens must be at least 1, got {max_new_tokens}",
    )
