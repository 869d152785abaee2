"""A recipe's unknown setting is answered with the one that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrl_sglang import ConfigError
from torchrl_sglang.recipes.setup import setting_names
from torchrl_sglang.recipes.setup.config import Arguments, load_config

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


def test_the_settings_of_the_table_exist() -> None:
    config = load_config(RECIPE, Arguments())
    for meant in set(setting_names._OTHER_NAMES.values()):
        node = config
        for part in meant.split("."):
            assert part in node, f"{meant} is no setting of grpo.py"
            node = node._get_node(part) if part != meant.split(".")[-1] else node
