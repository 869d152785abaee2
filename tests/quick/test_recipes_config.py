"""A recipe's configuration: presets, overrides, errors that name the nearest key, and what a resume reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import ConfigError, recipes
from torchrl_sglang.hydra_configs import close_engines, shared_engine
from torchrl_sglang.recipes.setup.config import load_config, parse_arguments, save_config

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(folder.name for folder in (EXAMPLES / "config").iterdir() if folder.name != "common")
RECIPE = EXAMPLES / "grpo_async.py"


def load(*words: str, recipe: Path = RECIPE) -> OmegaConf:
    return load_config(recipe, parse_arguments(recipe, ["model=/some/model", *words]))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_every_preset_of_every_recipe_is_whole(name: str, preset: str) -> None:
    recipe = EXAMPLES / f"{name}.py"
    assert recipe.exists(), f"config/{name} belongs to no recipe"
    config = load("--preset", preset, recipe=recipe)
    assert OmegaConf.to_container(config, resolve=True)["policy"]["engine"]["model"] == "/some/model"
    recipes.TrainSettings(**config.train)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["trian.lr=1e-3"], "unknown setting 'trian.lr'. Did you mean 'train.lr'"),
        (["train.answer=4"], "unknown setting 'train.answer'. Did you mean 'train.answers'"),
        (["loss.zzz=4"], "There are loss.clip_epsilon, loss.importance_cap"),
        (["policy.generate_kwargs.top_k=5"], r"added with \+policy.generate_kwargs.top_k="),
        (["train.lr=fast"], "'fast' of type 'str' could not be converted to Float"),
        (["train.answers=0"], "answers must be positive, got 0"),
        (["train.schedule=cosin"], "Did you mean 'cosine'"),
        (["evaluate.ks=[1,64]"], "pass@64 can't be estimated from 8 answers"),
        (["train.lr"], "written key=value"),
        (["engine.url=http://a", "engine.dp_size=2"], "engine.url attaches .*engine.dp_size can't be honoured"),
        (["--resume", "/nowhere"], "no run to resume in /nowhere"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(*words)


def test_an_unknown_preset_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(RECIPE, ["--preset", "tpu"])
    assert "cpu, gpu" in capsys.readouterr().err.replace("'", "")


def test_a_url_takes_the_place_of_launching_and_reaches_policy_and_scheme() -> None:
    config = load("engine.url=http://host:1")
    for node in (config.engine, config.policy.engine, config.weight_sync_schemes.policy.servers):
        assert node.url == "http://host:1"
        assert node.model is None
        assert node.dtype is None


def test_a_saved_configuration_is_resumed_and_still_changed_in_one_place(tmp_path: Path) -> None:
    config = load("train.lr=0.5", "engine.url=http://old:1")
    save_config(config, tmp_path)
    again = load_config(RECIPE, parse_arguments(RECIPE, ["--resume", str(tmp_path), "engine.url=http://new:1"]))
    assert again.train.lr == 0.5
    assert again.policy.engine.url == "http://new:1"
    assert again.run.folder == str(tmp_path)


def test_a_task_given_whole_has_nothing_of_the_presets() -> None:
    assert load("task={name: jsonl, path: /a, prompt_key: q}").task == {
        "name": "jsonl",
        "path": "/a",
        "prompt_key": "q",
    }
    assert load("task.largest=20").task.held_out == 16


def test_overrides_carry_any_text() -> None:
    for text in ("/a b/c=d,{x}[1]", "it's back\\slash\\", "null"):
        assert load(recipes.override("run.folder", text)).run.folder == text


def test_engines_are_shared_by_equal_arguments_until_they_are_closed(tiny_llama: Path) -> None:
    with FakeServer(FakeSettings(model_path=tiny_llama)) as server:
        config = load(f"engine.url={server.url}", f"model={tiny_llama}")
        with recipes.Serving(config) as serving:
            assert serving.policy.pool is serving.servers.pool is serving.scheme.pool
            assert instantiate(config.engine) is serving.servers
            assert shared_engine(server.url, name="another") is not serving.servers
        later = instantiate(config.engine)
        assert later is not serving.servers
        close_engines()


def test_no_launched_server_gets_lists_of_omegaconf() -> None:
    config = OmegaConf.create({"gpus": [[0], [1]]})
    with pytest.raises(ConfigError, match="gpus"):  # refused by the engine, not by whatever meets a ListConfig first
        shared_engine(model="/nowhere", dp_size=3, gpus=config.gpus)
