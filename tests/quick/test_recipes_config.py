"""A recipe's configuration: presets, overrides, errors that name the nearest key, and resuming."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.fake_sglang import FakeServer, FakeSettings
from torchrl_sglang import ConfigError, recipes
from torchrl_sglang.hydra_configs import close_engines, shared_engine
from torchrl_sglang.recipes.setup.arguments import parse_arguments
from torchrl_sglang.recipes.setup.config import load_config, save_config

EXAMPLES = Path(__file__).parents[2] / "examples"
PRESETS = sorted((file.parent.name, file.stem) for file in (EXAMPLES / "config").glob("*/*.yaml"))
PRESETS = [(name, preset) for name, preset in PRESETS if name != "common"]
RECIPE = EXAMPLES / "grpo_async.py"


def load(*words: str, recipe: Path = RECIPE) -> OmegaConf:
    return load_config(recipe, parse_arguments(recipe, ["model=/some/model", *words]))


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_preset_of_every_recipe_is_complete(name: str, preset: str) -> None:
    recipe = EXAMPLES / f"{name}.py"
    assert recipe.exists(), f"config/{name} belongs to no recipe"
    config = load("--preset", preset, "train.seed=7", recipe=recipe)
    assert config.train.seed == 7, "overrides may follow an option"
    assert OmegaConf.to_container(config, resolve=True)["policy"]["engine"]["model"] == "/some/model"
    recipes.TrainSettings(**config.train)


@pytest.mark.parametrize("name", sorted({name for name, _ in PRESETS}))
def test_every_recipe_sets_the_threads_wait_policy_before_it_imports_torch(name: str) -> None:
    code = (EXAMPLES / f"{name}.py").read_text()
    before, _, after = code.partition('os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")')
    assert "import torch" in after, "the policy is not set"
    loaded = re.findall(r"^(?:import|from) (torch\w*|tensordict|peft)", before, re.MULTILINE)
    assert loaded == [], "torch is loaded before the policy is set"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["trian.lr=1e-3"], "unknown setting 'trian.lr'. Did you mean 'train.lr'"),
        (["train.answer=4"], "unknown setting 'train.answer'. Did you mean 'train.answers'"),
        (["loss.zzz=4"], "There are loss.clip_epsilon, loss.importance_cap"),
        (["policy.generate_kwargs.top_k=5"], r"added with \+policy.generate_kwargs.top_k="),
        (["train.lr=fast"], "'fast' of type 'str' could not be converted to Float"),
        (["train.answers=0"], "answers must be positive, got 0"),
        (["train.answers=1"], "train.answers must be at least 2: GRPO compares"),
        (["train.steps=0"], "steps must be positive, got 0"),
        (["train.questions=-1"], "questions must be positive, got -1"),
        (["train.micro_batch=0"], "micro_batch must be positive, got 0"),
        (["policy.generate_kwargs.max_new_tokens=0"], "max_new_tokens must be at least 1, got 0"),
        (["train.schedule=cosin"], "Did you mean 'cosine'"),
        (["evaluate.ks=[1,64]"], "pass@64 can't be estimated from 8 answers"),
        (["train.lr"], "written key=value"),
        (["engine.url=http://a", "engine.dp_size=2"], "engine.url attaches .*engine.dp_size can't be honoured"),
        (["--resume", "/nowhere"], "no run to resume in /nowhere"),
    ],
)
def test_an_invalid_command_line_is_refused_with_the_reason(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(*words)


def test_an_unknown_preset_is_refused_with_a_list_of_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(RECIPE, ["--preset", "tpu"])
    assert "cpu, gpu" in capsys.readouterr().err.replace("'", "")


@pytest.mark.parametrize("words", [["--steps", "3"], ["--res", "outputs/run"], ["--pre=gpu"], ["-p", "gpu"]])
def test_unknown_and_abbreviated_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(EXAMPLES / "grpo.py", words)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_critic_needs_no_groups() -> None:
    assert load("train.answers=1", recipe=EXAMPLES / "ppo.py").train.answers == 1


def test_a_model_inside_the_run_folder_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "run" / "checkpoint"
    model.mkdir(parents=True)
    recipe = EXAMPLES / "grpo.py"
    with pytest.raises(ConfigError, match=r"is inside run\.folder=.* set another run\.folder"):
        load(f"run.folder={tmp_path / 'run'}", f"model={model}", recipe=recipe)
    load(f"run.folder={tmp_path / 'other'}", f"model={model}", recipe=recipe)
    load("run.folder=.", "model=Qwen/Qwen3-0.6B", recipe=recipe)


def test_a_url_replaces_launching_and_reaches_policy_and_scheme() -> None:
    config = load("engine.url=http://host:1")
    for node in (config.engine, config.policy.engine, config.weight_sync_schemes.policy.servers):
        assert node.url == "http://host:1"
        assert node.model is None
        assert node.dtype is None


def test_one_override_changes_a_resumed_configuration_everywhere(tmp_path: Path) -> None:
    config = load("train.lr=0.5", "engine.url=http://old:1")
    save_config(config, tmp_path)
    again = load_config(RECIPE, parse_arguments(RECIPE, ["--resume", str(tmp_path), "engine.url=http://new:1"]))
    assert again.train.lr == 0.5
    assert again.policy.engine.url == "http://new:1"
    assert again.run.folder == str(tmp_path)


def test_a_whole_task_replaces_the_presets_task() -> None:
    assert load("task={name: jsonl, path: /a, prompt_key: q}").task == {
        "name": "jsonl",
        "path": "/a",
        "prompt_key": "q",
    }
    assert load("task.largest=20").task.held_out == 16


def test_overrides_carry_any_text() -> None:
    for quoted, text in (
        ("'/a b/c=d,{x}[1]'", "/a b/c=d,{x}[1]"),
        ("'it\\'s back\\slash\\\\'", "it's back\\slash\\"),
        ("'null'", "null"),
    ):
        assert load(f"run.folder={quoted}").run.folder == text


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


def test_launched_servers_get_plain_lists() -> None:
    config = OmegaConf.create({"gpus": [[0], [1]]})
    with pytest.raises(ConfigError, match="gpus"):  # the engine's own check, not an error about a ListConfig
        shared_engine(model="/nowhere", dp_size=3, gpus=config.gpus)
