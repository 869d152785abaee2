"""The start of a recipe: mistyped words are refused with what was meant, and what is shown fits a log file."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from torchrl_sglang import ConfigError, recipes
from torchrl_sglang.hydra_configs import build
from torchrl_sglang.recipes.batch.sequences import Sequences
from torchrl_sglang.recipes.run.display import Display
from torchrl_sglang.recipes.setup.config import known_settings, save_config
from torchrl_sglang.recipes.setup.settings import CheckpointSettings

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(folder.name for folder in (EXAMPLES / "config").iterdir() if folder.name != "common")


def run(*words: str, recipe: str = "grpo", train: Any = None) -> str:
    """The message with which the program ends."""

    def not_reached(*_: Any) -> bool:
        raise AssertionError("a mistyped command line ran")

    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        recipes.run_program(EXAMPLES / f"{recipe}.py", train or not_reached, words=words)
    return said.getvalue() + str(end.value)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--step", "3"], "train.steps=3"),
        (["--steps=3"], "train.steps=3"),
        (["--train.steps", "3"], "train.steps=3"),
        (["--lr", "1e-6"], "train.lr=1e-6"),
        (["--learning-rate=1e-6"], "train.lr=1e-6"),
        (["--model", "Qwen/Qwen3-0.6B"], "model=Qwen/Qwen3-0.6B"),
        (["--output_dir", "x"], "run.folder=x"),
        (["--max-tokens", "3"], "policy.generate_kwargs.max_new_tokens=3"),
        (["--res", "outputs/run"], "Did you mean --resume?"),
        (["--overwite"], "Did you mean --overwrite?"),
        (["--resume", "a", "--overwrite"], "not allowed with argument"),
        (["steps=3"], "unknown setting 'steps'. Did you mean 'train.steps'?"),
        (["step=3"], "unknown setting 'step'. Did you mean 'train.steps'?"),
        (["train.step=3"], "Did you mean 'train.steps'?"),
        (["train.learning_rate=1"], "Did you mean 'train.lr'?"),
        (["train.batch_size=1"], "Did you mean 'train.questions'?"),
        (["train.num_generations=1"], "Did you mean 'train.answers'?"),
        (["train.temperature=1"], "Did you mean 'policy.generate_kwargs.temperature'?"),
        (["policy.max_tokens=3"], "Did you mean 'policy.generate_kwargs.max_new_tokens'?"),
        (["engine.tensor_parallel_size=2"], "Did you mean 'engine.tp_size'?"),
        (["output=x"], "Did you mean 'run.folder'?"),
        (["+train.learning_rate=1"], "Did you mean 'train.lr'?"),
        (["3"], "written key=value"),
        (["train.steps 3"], "written key=value"),
    ],
)
def test_a_mistyped_command_line_does_not_run_and_names_what_was_meant(words: list[str], meant: str) -> None:
    assert meant in run(*words)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_refuses_a_mistyped_option(recipe: str) -> None:
    assert "unrecognized arguments: --step. Settings are written key=value: train.steps=3" in run(
        "--step", "3", recipe=recipe
    )


def test_a_name_of_another_trainer_is_suggested_only_where_the_recipe_has_the_setting() -> None:
    assert "Did you mean 'rollouts.max_staleness'?" in run("max_staleness=3", recipe="grpo_async")
    assert "rollouts" not in run("max_staleness=3", recipe="ppo")
    assert "Did you mean 'ppo.kl_coef'?" in run("beta=0.1", recipe="ppo")


def test_every_suggested_setting_exists_in_a_recipe() -> None:
    from torchrl_sglang.recipes.setup.names import _OTHER_NAMES

    known = {key for recipe in RECIPES for key in known_settings(EXAMPLES / f"{recipe}.py", "cpu")}
    assert {setting for settings in _OTHER_NAMES.values() for setting in settings} <= known


def test_a_folder_with_an_earlier_run_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step\n1\n")
    said = run(f"run.folder={tmp_path}")
    assert "holds the results of an earlier run (metrics.csv)" in said
    for choice in (f"--resume {tmp_path}", "run.folder=", "--overwrite"):
        assert choice in said
    reached: list[bool] = []

    def train(config: Any, resume: bool) -> bool:
        reached.append(bool(config.run.overwrite))
        save_config(config, tmp_path)
        return False

    run(f"run.folder={tmp_path}", "--overwrite", train=train)
    assert reached == [True]
    assert (tmp_path / "metrics.csv").exists(), "the run did not begin"
    assert OmegaConf.load(tmp_path / "config.yaml").run.overwrite is False, "a resumed run must not inherit it"


def test_an_error_inside_hydra_is_shown_as_it_is() -> None:
    with pytest.raises(ConfigError) as raised:
        build(OmegaConf.create({"_target_": "torchrl_sglang.hydra_configs.shared_engine"}))
    assert str(raised.value) == "an engine needs either url (running servers) or model (servers to launch)"
    with pytest.raises(ConfigError, match=r"make_scheme can't be built: .*unexpected keyword argument 'no_such'"):
        build(OmegaConf.create({"_target_": "torchrl_sglang.hydra_configs.make_scheme", "no_such": 1}))
    with pytest.raises(ConfigError, match="can't be built"):
        build(OmegaConf.create({"_target_": "torchrl_sglang.no_such_module.x"}))


def test_a_log_file_gets_a_line_per_phase_and_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(total=2)
    for second in range(3):
        display.say(f"importing SGLang (usually 8 s), {second} s")
    display.say("loading the weights (usually 1 s per GB), 3 s")
    display.start()
    for step in (1, 2):
        for part in range(8):
            display.say(f"training {part}/8")
        display.line(f"step {step}")
        display.step()
    display.close()
    shown = capsys.readouterr()
    assert shown.out == "step 1\nstep 2\n"
    assert shown.err == "importing SGLang (usually 8 s)\nloading the weights (usually 1 s per GB)\n"


def test_a_terminals_bar_counts_from_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    display = Display(total=4, initial=1)
    display.say("loading")
    assert display._bar is None, "loading would count into the time per step"
    display.start()
    bar = display._bar
    display.start()
    assert display._bar is bar
    assert (bar.n, bar.total) == (1, 4)
    display.close()


def test_the_cpu_presets_keep_one_checkpoint() -> None:
    assert CheckpointSettings().keep == 1
    for recipe in RECIPES:
        config = recipes.load_config(EXAMPLES / f"{recipe}.py", recipes.parse_arguments(EXAMPLES / f"{recipe}.py", []))
        assert (config.checkpoint.keep, config.checkpoint.previous) == (1, False)


def test_a_sample_begins_with_what_a_person_reads() -> None:
    ids = torch.tensor([1, 2])
    answers = Sequences(
        prompt_B_T=[ids],
        response_B_R=[ids],
        server_N=torch.zeros(2),
        version_N=torch.tensor([3, 4]),
        reward_B=torch.tensor([0.5]),
        right_B=torch.tensor([True]),
        truncated_B=torch.tensor([False]),
        position_B=torch.tensor([7]),
    )

    class Tokenizer:
        def decode(self, ids: torch.Tensor) -> str:
            return f"{len(ids)} tokens"

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [str(index) for index in ids]

        def convert_tokens_to_ids(self, token: str) -> None:
            """It has no byte-level vocabulary."""

    (line,) = recipes.sample_lines(1, answers, Tokenizer())
    assert list(line.items())[:3] == [("prompt", "2 tokens"), ("response", "2 tokens"), ("reward", 0.5)]
    assert line["weight_version"] == 4


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "hydra" else find_spec(name))
    monkeypatch.delitem(sys.modules, "torchrl_sglang.recipes.available")
    with pytest.raises(ImportError, match=r"needs hydra: pip install 'torchrl-sglang\[recipes\]'"):
        importlib.import_module("torchrl_sglang.recipes.available")
