"""A recipe's unknown setting is answered with the one that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrl_sglang import ConfigError
from torchrl_sglang.recipes.setup import names
from torchrl_sglang.recipes.setup.config import Arguments, _keys, load_config

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "grpo.py"


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.learning_rate=1e-4", "train.lr"),
        ("learning_rate=1e-4", "train.lr"),
        ("lr=1e-4", "train.lr"),
        ("steps=3", "train.steps"),
        ("train.step=3", "train.steps"),
        ("train.max_steps=3", "train.steps"),
        ("train.group_size=4", "train.answers"),
        ("policy.generate_kwargs.max_tokens=4", "policy.generate_kwargs.max_new_tokens"),
        ("max_new_tokens=4", "policy.generate_kwargs.max_new_tokens"),
        ("output_dir=x", "run.folder"),
        ("modle=x", "model"),
        ("engine.urls=x", "engine.url"),
    ],
)
def test_the_setting_that_was_meant_is_named(override: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown setting .*Did you mean '{meant}'\?"):
        load_config(RECIPE, Arguments(overrides=(override,)))


def test_a_setting_like_no_other_is_answered_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match="There are .*run.folder"):
        load_config(RECIPE, Arguments(overrides=("run.qqqqqqqqqqqqqqqqq=3",)))


def test_the_settings_of_the_table_exist_in_a_recipe() -> None:
    known = set()
    for recipe in sorted(RECIPE.parent.glob("*.py")):
        if (RECIPE.parent / "config" / recipe.stem).is_dir():
            known |= set(_keys(load_config(recipe, Arguments())))
    unknown = {setting for meant in names._OTHER_NAMES.values() for setting in meant} - known
    assert unknown == set()
